"""Patches Caffe's source of 2020 for current libraries, for VGG, and for GPUs.

    python patches.py CAFFE_SOURCE_DIR OUTPUT_DIR

Writes the changed files to OUTPUT_DIR, headers below OUTPUT_DIR/include, and those that only builds
without CUDA use below OUTPUT_DIR/cpu_only. If any of its old texts is missing, a file is copied
unchanged, because your own checkout may already be patched.
"""

import pathlib
import sys

# {file: ((old text, new text), ...)}

# Python uses single precision only; compiling double precision too takes half as long again. (Some
# CUDA kernels need it.)
CPU_ONLY = {
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
}

PATCHES = {
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
    # On a GPU: the kernels write every value, so none need be 0 before; one sum instead of three.
    "src/caffe/layers/pooling_layer.cu": (
        ("  caffe_gpu_set(count, Dtype(0.), bottom_diff);\n", ""),
    ),
    "src/caffe/layers/split_layer.cu": (
        (
            '#include "caffe/layers/split_layer.hpp"\n',
            '#include "caffe/layers/split_layer.hpp"\n#include "cnn_vis_fused.hpp"\n',
        ),
        (
            "  caffe_gpu_add(count_, top[0]->gpu_diff(), top[1]->gpu_diff(),\n",
            "  if (SumDiffs(top, bottom[0])) return;\n"
            "  caffe_gpu_add(count_, top[0]->gpu_diff(), top[1]->gpu_diff(),\n",
        ),
    ),
    # What is copied between the host and a GPU is what a blob holds, not what it has room for. (A
    # net that has once had 32 tiles would copy 19 MB each way for one.)
    "include/caffe/syncedmem.hpp": (
        (
            "  size_t size() const { return size_; }\n",
            "  size_t size() const { return size_; }\n"
            "  void set_used(size_t used) { used_ = used; }  // of it, the bytes to copy\n",
        ),
        ("  size_t size_;\n", "  size_t size_, used_ = size_;\n"),
        # Pinning memory takes far longer than copying a few bytes from memory that is not.
        (
            "  if (Caffe::mode() == Caffe::GPU) {\n",
            "  if (Caffe::mode() == Caffe::GPU && size > 4096) {\n",
        ),
    ),
    "src/caffe/syncedmem.cpp": (
        (
            "caffe_gpu_memcpy(size_, gpu_ptr_, cpu_ptr_);",
            "caffe_gpu_memcpy(used_, gpu_ptr_, cpu_ptr_);",
        ),
        (
            "caffe_gpu_memcpy(size_, cpu_ptr_, gpu_ptr_);",
            "caffe_gpu_memcpy(used_, cpu_ptr_, gpu_ptr_);",
        ),
    ),
    "src/caffe/blob.cpp": (
        (
            "    diff_.reset(new SyncedMemory(capacity_ * sizeof(Dtype)));\n  }\n",
            "    diff_.reset(new SyncedMemory(capacity_ * sizeof(Dtype)));\n  }\n"
            "  for (const auto& memory : {data_, diff_}) {\n"
            "    if (memory) memory->set_used(count_ * sizeof(Dtype));\n"
            "  }\n",
        ),
    ),
    # cuRAND is started when something asks for it: it takes time, and memory of the GPU.
    "include/caffe/common.hpp": (
        (
            "    return Get().curand_generator_;\n",
            "    return Get().StartCurand();\n",
        ),
        (
            "  curandGenerator_t curand_generator_;\n",
            "  curandGenerator_t curand_generator_;\n  curandGenerator_t StartCurand();\n",
        ),
    ),
    # A pass can become a CUDA graph, with its copies between the host and the GPU: then all work is
    # in one stream, the thread's default stream (see cuda.cmake), and does not wait for the host.
    "src/caffe/common.cpp": (
        (
            '    LOG(ERROR) << "Cannot create Cublas handle. Cublas won\'t be available.";\n  }\n',
            '    LOG(ERROR) << "Cannot create Cublas handle. Cublas won\'t be available.";\n'
            "  } else {\n"
            "    CUBLAS_CHECK(cublasSetStream(cublas_handle_, cudaStreamPerThread));\n"
            "  }\n",
        ),
        (
            "  CUBLAS_CHECK(cublasCreate(&Get().cublas_handle_));\n",
            "  CUBLAS_CHECK(cublasCreate(&Get().cublas_handle_));\n"
            "  CUBLAS_CHECK(cublasSetStream(Get().cublas_handle_, cudaStreamPerThread));\n",
        ),
        (
            "  // Try to create a curand handler.\n  if (curandCreateGenerator(",
            "}\n\ncurandGenerator_t Caffe::StartCurand() {\n"
            "  if (curand_generator_) return curand_generator_;\n"
            "  if (curandCreateGenerator(",
        ),
        (
            'LOG(ERROR) << "Cannot create Curand generator. Curand won\'t be available.";\n  }\n',
            'LOG(ERROR) << "Cannot create Curand generator. Curand won\'t be available.";\n  }\n'
            "  return curand_generator_;\n",
        ),
        (
            "  if (Get().curand_generator_) {\n"
            "    CURAND_CHECK(curandSetPseudoRandomGeneratorSeed(",
            "  if (curand_generator()) {\n    CURAND_CHECK(curandSetPseudoRandomGeneratorSeed(",
        ),
        (
            "    CURAND_CHECK(curandDestroyGenerator(Get().curand_generator_));\n  }\n",
            "    CURAND_CHECK(curandDestroyGenerator(Get().curand_generator_));\n"
            "    Get().curand_generator_ = NULL;\n  }\n",
        ),
        (
            "  CURAND_CHECK(curandCreateGenerator(&Get().curand_generator_,\n"
            "      CURAND_RNG_PSEUDO_DEFAULT));\n"
            "  CURAND_CHECK(curandSetPseudoRandomGeneratorSeed(Get().curand_generator_,\n"
            "      cluster_seedgen()));\n",
            "",
        ),
    ),
    "src/caffe/util/math_functions.cpp": (
        (
            "CUDA_CHECK(cudaMemcpy(Y, X, sizeof(Dtype) * N, cudaMemcpyDefault));",
            "caffe_gpu_memcpy(sizeof(Dtype) * N, X, Y);",
        ),
    ),
    "src/caffe/util/math_functions.cu": (
        (
            "    CUDA_CHECK(cudaMemcpy(Y, X, N, cudaMemcpyDefault));  // NOLINT(caffe/alt_fn)\n",
            "    cudaStreamCaptureStatus status;\n"
            "    CUDA_CHECK(cudaStreamIsCapturing(cudaStreamPerThread, &status));\n"
            "    if (status == cudaStreamCaptureStatusNone) {\n"
            "      CUDA_CHECK(cudaMemcpy(Y, X, N, cudaMemcpyDefault));\n"
            "    } else {\n"
            "      CUDA_CHECK(cudaMemcpyAsync(Y, X, N, cudaMemcpyDefault, cudaStreamPerThread));\n"
            "    }\n",
        ),
        (
            "CUDA_CHECK(cudaMemset(Y, 0, sizeof(Dtype) * N));",
            "CUDA_CHECK(cudaMemsetAsync(Y, 0, sizeof(Dtype) * N, cudaStreamPerThread));",
        ),
    ),
    "include/caffe/util/math_functions.hpp": (
        (
            "CUDA_CHECK(cudaMemset(X, alpha, N));",
            "CUDA_CHECK(cudaMemsetAsync(X, alpha, N, cudaStreamPerThread));",
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
    "python/caffe/_caffe.cpp": (
        # A layer's loss, which Caffe otherwise computes and waits for at every pass.
        (
            '    .def("reshape", &Layer<Dtype>::Reshape)\n',
            '    .def("reshape", &Layer<Dtype>::Reshape)\n'
            '    .def("set_loss", &Layer<Dtype>::set_loss)\n',
        ),
        # Read-only arrays of a blob. Caffe assumes that any access to `data` or `diff` changes it,
        # and copies it to the GPU again.
        (
            '    .add_property("data",     bp::make_function(&Blob<Dtype>::mutable_cpu_data,\n',
            "".join(
                f'    .add_property("cpu_{name}", bp::make_function(\n'
                "          +[](Blob<Dtype>& blob) "
                f"{{ return const_cast<Dtype*>(blob.cpu_{name}()); }},\n"
                "          NdarrayCallPolicies()))\n"
                for name in ("data", "diff")
            )
            # Where it is on the GPU; Caffe assumes that it is then changed there.
            + "".join(
                f'    .add_property("gpu_{name}_address",\n'
                "          +[](Blob<Dtype>& blob) "
                f"{{ return reinterpret_cast<size_t>(blob.mutable_gpu_{name}()); }})\n"
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
    files = [("cpu_only", *file) for file in CPU_ONLY.items()]
    files += [("include", *file) for file in PATCHES.items()]
    for headers, name, changes in files:
        text = (pathlib.Path(source) / name).read_text(encoding="utf-8")
        missing = [old.strip() for old, _ in changes if old not in text]
        if missing:
            print(f"{name} is not patched; it does not contain: {missing[0]}")
            changes = ()
        for old, new in changes:
            text = text.replace(old, new)
        if name.startswith("include/"):  # headers are included by path, sources are not
            name = name.replace("include", headers, 1)
        else:
            name = pathlib.Path(name).name
        path = pathlib.Path(output) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
