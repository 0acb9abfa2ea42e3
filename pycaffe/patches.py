"""Patches Caffe's source of 2020 for current libraries, and for VGG.

    python patches.py CAFFE_SOURCE_DIR OUTPUT_DIR

Writes the changed files to OUTPUT_DIR, headers below OUTPUT_DIR/include. If any of its old texts is
missing, a file is copied unchanged, because your own checkout may already be patched.
"""

import pathlib
import sys

PATCHES = {  # {file: ((old text, new text), ...)}
    # Python uses single precision only; compiling double precision too takes half as long again.
    "include/caffe/common.hpp": (
        (
            "  template class classname<float>; \\\n  template class classname<double>\n",
            "  template class classname<float>\n",
        ),
        (
            "  template void classname<double>::Forward_gpu( \\\n"
            "      const std::vector<Blob<double>*>& bottom, \\\n"
            "      const std::vector<Blob<double>*>& top);\n",
            "\n",
        ),
        (
            "; \\\n"
            "  template void classname<double>::Backward_gpu( \\\n"
            "      const std::vector<Blob<double>*>& top, \\\n"
            "      const std::vector<bool>& propagate_down, \\\n"
            "      const std::vector<Blob<double>*>& bottom)\n",
            "\n",
        ),
    ),
    "include/caffe/layer_factory.hpp": (
        ("  static LayerRegisterer<double> g_creator_d_##type(#type, creator<double>) ", " "),
    ),
    "include/caffe/solver_factory.hpp": (
        ("  static SolverRegisterer<double> g_creator_d_##type(#type, creator<double>) ", " "),
    ),
    # Caffe's master limits a network to 512 MB, less than VGG's 553 MB; the limit used to be 2 GB.
    "src/caffe/util/io.cpp": (
        ("SetTotalBytesLimit(536870912)", "SetTotalBytesLimit(kProtoReadBytesLimit)"),
    ),
    # Layers are reshaped at every pass. These layers then rewrite their arrays of ones, which are
    # copied to the GPU each time; patched, they do so only if the length has changed.
    "src/caffe/layers/base_conv_layer.cpp": (
        (
            "  if (bias_term_) {\n    vector<int> bias_multiplier_shape(1, out_spatial_dim_);\n",
            "  if (bias_term_ && bias_multiplier_.count() != out_spatial_dim_) {\n"
            "    vector<int> bias_multiplier_shape(1, out_spatial_dim_);\n",
        ),
    ),
    "src/caffe/layers/inner_product_layer.cpp": (
        (
            "  if (bias_term_) {\n    vector<int> bias_shape(1, M_);\n",
            "  if (bias_term_ && bias_multiplier_.count() != M_) {\n"
            "    vector<int> bias_shape(1, M_);\n",
        ),
    ),
    "src/caffe/layers/softmax_layer.cpp": (
        (
            "  sum_multiplier_.Reshape(mult_dims);\n"
            "  Dtype* multiplier_data = sum_multiplier_.mutable_cpu_data();\n"
            "  caffe_set(sum_multiplier_.count(), Dtype(1), multiplier_data);\n",
            "  if (sum_multiplier_.count() != mult_dims[0]) {\n"
            "    sum_multiplier_.Reshape(mult_dims);\n"
            "    caffe_set(mult_dims[0], Dtype(1), sum_multiplier_.mutable_cpu_data());\n"
            "  }\n",
        ),
    ),
    "python/caffe/__init__.py": (
        ("from .pycaffe import ", "from . import processor\nfrom .pycaffe import "),
    ),
    "python/caffe/io.py": (
        # Only two functions need scikit-image and SciPy, which take most of the time of `import
        # caffe`, so these functions import them.
        ("\nimport skimage.io\n", "\n"),
        ("\nfrom scipy.ndimage import zoom\n", "\n"),
        ("\nfrom skimage.transform import resize\n", "\n"),
        (
            "    if im.shape[-1] == 1 or im.shape[-1] == 3:\n",
            "    from scipy.ndimage import zoom\n"
            "    from skimage.transform import resize\n"
            "    if im.shape[-1] == 1 or im.shape[-1] == 3:\n",
        ),
        # scikit-image no longer has as_grey, and now smooths pictures before it reduces them.
        (
            "    img = skimage.img_as_float(skimage.io.imread(filename, as_grey=not color))"
            ".astype(np.float32)\n",
            "    import skimage.color\n"
            "    import skimage.io\n"
            "    import skimage.util\n"
            "    img = skimage.util.img_as_float(skimage.io.imread(filename)).astype(np.float32)\n"
            "    if img.ndim == 3 and img.shape[2] in (2, 4):\n"
            "        img = img[:, :, :-1]  # without alpha\n"
            "    if img.ndim == 3 and img.shape[2] == 1:\n"
            "        img = img[:, :, 0]\n"
            "    if img.ndim == 3 and not color:\n"
            "        img = skimage.color.rgb2gray(img)\n",
        ),
        (
            "order=interp_order, mode='constant')",
            "order=interp_order, mode='constant', anti_aliasing=False)",
        ),
        # NumPy no longer has tostring and binary fromstring.
        ("arr.tostring()", "arr.tobytes()"),
        (
            "np.fromstring(datum.data, dtype=np.uint8).reshape(",
            "np.frombuffer(datum.data, dtype=np.uint8).copy().reshape(",
        ),
        # Support a mean of one channel, or of one constant value.
        ("ms = (1,) + ms\n", "mean, ms = mean[np.newaxis], (1,) + ms\n"),
        ("(mean - m_min) / (m_max - m_min)", "(mean - m_min) / ((m_max - m_min) or 1)"),
    ),
    # Read-only arrays of a blob. Caffe assumes that any access to `data` or `diff` changes it, and
    # copies it to the GPU again.
    "python/caffe/_caffe.cpp": (
        (
            '    .add_property("data",     bp::make_function(&Blob<Dtype>::mutable_cpu_data,\n',
            "".join(
                f'    .add_property("cpu_{name}", bp::make_function(\n'
                "          +[](Blob<Dtype>& blob) "
                f"{{ return const_cast<Dtype*>(blob.cpu_{name}()); }},\n"
                "          NdarrayCallPolicies()))\n"
                for name in ("data", "diff")
            )
            + '    .add_property("data",     bp::make_function(&Blob<Dtype>::mutable_cpu_data,\n',
        ),
    ),
    # NumPy no longer accepts floats as indices.
    "python/caffe/detector.py": (
        (
            "box = np.clip(box, 0., [im_h, im_w, im_h, im_w])",
            "box = np.clip(box, 0., [im_h, im_w, im_h, im_w]).astype(int)",
        ),
    ),
}


def main(source, output):
    for name, changes in PATCHES.items():
        text = (pathlib.Path(source) / name).read_text(encoding="utf-8")
        missing = [old.strip() for old, _ in changes if old not in text]
        if missing:
            print(f"{name} is not patched; it does not contain: {missing[0]}")
            changes = ()
        for old, new in changes:
            text = text.replace(old, new)
        is_header = name.startswith("include/")  # headers are included by path, sources are not
        path = pathlib.Path(output) / (name if is_header else pathlib.Path(name).name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
