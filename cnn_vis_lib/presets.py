"""Named sets of options: some for photographs, and one for a class; then the settings in the
original's README, except sizes that belong to its own pictures."""

import typing


class Preset(typing.NamedTuple):
    """A set of options: what its pictures look like, the options as words of a command line, and
    whether it is for photographs."""

    about: str
    options: str
    is_for_photographs: bool = False


_NOISE = "--initial_size=270x480 --final_size=1080x1920 --num_sizes=5 --num_steps=100 \
    --learning_rate=10 --decay_rate=0.25 --alpha=6 --p_reg=1e-10 --beta=2.5 --tv_reg=0.5"
_CLOSE = "--learning_rate=1 --decay_rate=0.9 --alpha=2 --p_reg=0.5 --beta=2.5 --tv_reg=0.05"
_EVEN = "--decay_rate=0.85 --alpha=2 --beta=2.5 --alpha_aux=8 --p_reg_aux=5e-11 \
    --use_pixel_learning_rates"
# The dream is a layer of its own over the photograph, which stays sharp and keeps its contrast.
_PHOTO = "--initial_size=smallest --final_size=900 --num_sizes=5 --enlarge=change --contrast=1 \
    --step_rule=mean --use_pixel_learning_rates --l1_weight=0 --grad_clip=1e9 --p_reg=0 --beta=2 \
    --iter_behavior=none --output_iter=5"
PRESETS = {
    "dream": Preset(
        "eyes, dogs and swirls grow out of the photograph",
        f"--layer=inception_4a/output+inception_4c/output {_PHOTO} --num_steps=15 \
            --learning_rate=3.75 --tv_reg=0.007",
        True,
    ),
    "animals": Preset(
        "whole animals, dogs and birds, where the photograph has shapes for them",
        f"--layer=inception_4b/output+inception_4d/output {_PHOTO} --num_steps=20 \
            --learning_rate=3 --tv_reg=0.015",
        True,
    ),
    "strokes": Preset(
        "lines and ornaments, drawn along the shapes of the photograph",
        f"--layer=inception_3a/output {_PHOTO} --num_steps=15 --learning_rate=2 --tv_reg=0.01",
        True,
    ),
    "soft": Preset(
        "small, soft scenes in flat places, in pale colours",
        f"--layer=inception_4c/output {_PHOTO} --num_steps=15 --learning_rate=2 --tv_reg=0.05",
        True,
    ),
    "class": Preset(
        "from noise: a class of the classifier, with --layer loss3/classifier:pineapple, say",
        "--layer=loss3/classifier:hen --image_type=amplify_neuron --initial_size=smallest \
            --final_size=x1.6 --num_sizes=3 --num_steps=80 --initialization_scale=10 \
            --enlarge=change --contrast=2 --step_rule=mean --use_pixel_learning_rates --p_reg=0 \
            --beta=2 --learning_rate=3 --tv_reg=0.015 --iter_behavior=none --output_iter=20",
    ),
    "example1": Preset(
        "from noise: animals and buildings", f"--layer=inception_4d/3x3_reduce {_NOISE}"
    ),
    "example2": Preset(
        "from noise: foxes, birds and snakes", f"--layer=inception_4c/output {_NOISE}"
    ),
    "example3": Preset("from noise: a higher layer", f"--layer=inception_4e/output {_NOISE}"),
    "example4": Preset(
        "from noise, in finer detail",
        f"--layer=inception_4d/3x3_reduce {_NOISE} --num_steps=200 --p_reg=1e-11 --tv_reg=0.01",
    ),
    "example5": Preset(
        "from noise: landscapes, with the network for places",
        f"--model=googlenet_places205 --layer=inception_4b/3x3_reduce {_NOISE} \
        --num_steps=200 --learning_rate=5 --decay_rate=0.95 --alpha=4 --p_reg=1e-9 --beta=2.0 \
        --tv_reg=0.3",
    ),
    "example6": Preset(
        "from noise: buildings, with the network for places",
        f"--model=googlenet_places205 --layer=inception_4c/pool {_NOISE} \
        --initialization_scale=10 --initialization_blur=1 --num_steps=150 --learning_rate=2 \
        --decay_rate=0.9 --alpha=4 --p_reg=1e-9 --tv_reg=1",
    ),
    "example7": Preset(
        "a photograph as a mosaic of small tiles",
        f"--layer=inception_3a/1x1 {_CLOSE} --initial_size=450 --final_size=840 \
        --num_sizes=2 --num_steps=30",
        True,
    ),
    "example8": Preset(
        "a photograph in ripples",
        f"--layer=inception_3a/3x3_reduce {_CLOSE} --initial_size=450 --final_size=840 \
        --num_sizes=2 --num_steps=30",
        True,
    ),
    "example9": Preset(
        "scales and faces in a photograph's flat places",
        f"--layer=inception_4d/output {_CLOSE} --initial_size=307 --final_size=640 \
        --num_sizes=3 --num_steps=50",
        True,
    ),
    "example10": Preset(
        "temples around the shapes of a photograph",
        f"--layer=inception_4d/pool {_CLOSE} --initial_size=340 --final_size=1280 \
        --num_sizes=4 --num_steps=50 --p_reg=5 --tv_reg=0.1",
        True,
    ),
    "example11": Preset(
        "animals in clouds of grey, kept close to the photograph",
        f"--layer=inception_4d/pool {_EVEN} --initial_size=230 --final_size=922 \
        --num_sizes=5 --num_steps=50 --learning_rate=1 --p_reg=10 --tv_reg=1",
        True,
    ),
    "example12": Preset(
        "soft eyes all over a photograph, in pale colours",
        f"--layer=inception_4c/output {_EVEN} --initial_size=361 --final_size=902 \
        --num_sizes=3 --num_steps=100 --learning_rate=5 --p_reg=0.5 --tv_reg=5",
        True,
    ),
    "example13": Preset(
        "stars and animals in a photograph of plain texture",
        f"--layer=inception_4b/5x5_reduce {_EVEN} --initial_size=307 --final_size=614 \
        --num_sizes=3 --num_steps=100 --learning_rate=5 --p_reg=0.5 --tv_reg=0.5",
        True,
    ),
}
