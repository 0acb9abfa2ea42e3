"""The options of network, device and output."""

from .behaviors import BEHAVIORS, behaviors
from .models import MODELS
from .option_types import file_name, gpu_numbers, input_size, not_empty, number, output_name
from .pixels import DEPTHS
from .presets import PRESETS


# fmt: off
def network_options(add):
    add("--preset", metavar="NAME", choices=tuple(PRESETS), text=None,
        help="use a named set of options: for photographs dream, animals, strokes or "
        "soft, for all others see --list_presets; options that you add override it")
    add("--list_presets", action="store_true",
        help="print the presets, what they look like and their options, and exit")
    add("--model", choices=tuple(MODELS),
        idle=lambda o: o.deploy_txt and o.caffe_model and o.mean_image and "all three files given",
        help="network to use; its weights are looked for in $CAFFE_ROOT, then in $CNN_VIS_MODELS "
        "or ~/.cache/cnn-vis (default: bvlc_googlenet if installed, else googlenet_mini)")
    add("--list_models", action="store_true",
        help="list these networks and whether they are installed, and exit")
    add("--list_layers", action="store_true",
        help="list the network's layers that can be amplified, and exit")
    add("--list_classes", action="store_true",
        help="list the classes of the network's classifier, and exit")
    add("--download_model", metavar="NAME",
        choices=tuple(model.name for model in MODELS.values() if model.url),
        help="download a network (%(choices)s), check it, and exit")
    add("--model_url", metavar="URL", type=not_empty,
        idle=lambda o: not o.download_model and "without --download_model",
        help="address to download the network from (default: the official one)")
    add("--deploy_txt", metavar="FILE", type=file_name, file="read",
        help="the network's description, a prototxt (default: the model's)")
    add("--caffe_model", metavar="FILE", type=file_name, file="read",
        help="the network's weights (default: the model's)")
    add("--mean_image", metavar="FILE", type=file_name, file="read",
        help="mean image (.npy, .binaryproto); its mean is subtracted from every pixel "
        "(default: the model's)")
    add("--input_size", metavar="SIZE", type=input_size,
        text=lambda size: "{}x{}".format(*size),
        help="tile size, HxW, or N for NxN; needed if the prototxt has none; a larger one gives "
        "more context to layers that accept any size (default: the prototxt's)")
    add("--input_scale", metavar="S", type=number(float, above=0),
        help="number by which the network's input is multiplied after the mean is subtracted, for "
        "networks trained on scaled pictures (default: 1, or what a training prototxt says)")


def device_options(add):
    add("--gpu", metavar="N", type=gpu_numbers,
        idle=lambda o: o.gpu and o.scheduler and "--scheduler",
        text=lambda gpus: ",".join(map(str, gpus)) or "-1",
        help="GPU to use, numbered from 0, or several, such as 0,1,2; -1 for the CPU "
        "(default: GPU 0 if Caffe can use it, else the CPU)")
    add("--batch_size", metavar="N", type=number(int, 1),
        idle=lambda o: o.scheduler and "--scheduler",
        help="maximum number of tiles that each of a GPU's two processes computes at once; always "
        "1 on the CPU (default: as many as fit in GPU memory, up to 32)")
    add("--tf32", action="store_true",
        idle=lambda o: o.scheduler and "--scheduler",
        help="let cuDNN multiply in TF32, with 10 bits of each factor: faster on recent GPUs, but "
        "a slightly different picture")
    add("--workers", metavar="N", type=number(int, 1, 1024),
        idle=lambda o: o.scheduler and "--scheduler",
        help="number of cores that compute on the CPU; the picture does not depend on it (default: "
        "all)")
    add("--scheduler", metavar="ADDRESS", type=not_empty, text=None,
        help="compute on the workers of the Dask cluster whose scheduler has this address, such "
        "as tcp://HOST:8786 (default: compute on this machine)")


def output_options(add):
    def has_no_turn(options):
        words = options.iter_behavior
        has_turn = not words or any(BEHAVIORS[word].at_end for word in words)
        is_late = options.output_iter > options.num_steps
        reason = f"--num_steps {options.num_steps} and --output_iter {options.output_iter}"
        return is_late and not has_turn and reason

    def is_not_shown(options):
        return "show" not in options.iter_behavior and "without show in --iter_behavior"

    def has_no_page(options):
        return "web" not in options.iter_behavior and "without web in --iter_behavior"

    add("--output_file", "--output", metavar="FILE", type=output_name, file="write",
        help="file for the finished picture; for several pictures FOLDER/, or a name that contains "
        "{name} (the start picture's) and {layer} (default: IMAGE_PRESET.png, or out.png without "
        "a preset)")
    add("--output_iter", metavar="N", type=number(int, 1), default=50,
        help="do --iter_behavior every N steps")
    add("--iter_behavior", metavar="WORDS", type=behaviors, default="save+print",
        idle=has_no_turn, text=lambda words: "+".join(sorted(words)) or "none",
        help=f"what to do during the run: {', '.join(BEHAVIORS)}, joined by +, or none; save "
        "writes NAME_1_50.EXT (size 1, step 50) next to it, plot writes NAME_plot.png, gif writes "
        "NAME_run.gif; without a display, show and plot_pix write NAME_show.png and "
        "NAME_plot_pix.png; web serves a page to watch the run in a browser")
    add("--web_port", metavar="N", type=number(int, 0, 65535), default=0,
        idle=has_no_page, help="port of the page that web serves; 0: any free one; it is printed")
    add("--web_host", metavar="HOST", type=not_empty, default="127.0.0.1", text=None,
        idle=has_no_page, help="address on which web listens; other machines cannot reach the "
        "default, and anyone who can reach another address can watch")
    add("--stats", metavar="FILE", type=output_name, file="write",
        help="measure every step, and write the statistics as CSV")
    add("--sidecar", action="store_true",
        help="write OUTPUT.json, a record of how the picture was made; a PNG always contains it")
    add("--reproduce", metavar="FILE", type=file_name,
        help="print the command that made a picture, and exit")
    add("--checkpoint_iter", metavar="N", type=number(int, 0),
        help="save OUTPUT.checkpoint, for --resume, every N steps; it is deleted when the run is "
        "complete; 0: never (default: --output_iter, at least 50, and every minute)")
    add("--resume", metavar="FILE", type=file_name, text=None,
        help="continue from a checkpoint; the run's options need not be given again")
    add("--quiet", action="store_true", text=None,
        help="no progress bar, no notices (and, with --iter_behavior none, no statistics)")
    add("--verbose", action="store_true", text=None,
        help="print more: the network's file, the layer's shape and all sizes; with --reproduce, "
        "all options")
    add("--show_width", metavar="W", type=number(float, 1, 100), default=5.0,
        idle=is_not_shown, help="width of the show window, in inches")
    add("--show_height", metavar="H", type=number(float, 1, 100), default=5.0,
        idle=is_not_shown, help="height of the show window, in inches")
    add("--depth", type=int, choices=tuple(DEPTHS),
        help="bits per channel in saved pictures; 16 only for .png and .tif")
    add("--rescale_image", action="store_true",
        help="stretch saved and shown pictures to the full range, instead of clipping")


# fmt: on
