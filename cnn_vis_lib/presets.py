"""Named sets of options: first the settings in the original's README, except sizes that belong to
its own pictures; then some for photographs."""

# Named sets of options. First the settings in the original's README, except sizes that belong to
# its own pictures; then some for photographs.
_NOISE = "--initial_size=270x480 --final_size=1080x1920 --num_sizes=5 --num_steps=100 \
    --learning_rate=10 --decay_rate=0.25 --alpha=6 --p_reg=1e-10 --beta=2.5 --tv_reg=0.5"
_CLOSE = "--learning_rate=1 --decay_rate=0.9 --alpha=2 --p_reg=0.5 --beta=2.5 --tv_reg=0.05"
_EVEN = "--decay_rate=0.85 --alpha=2 --beta=2.5 --alpha_aux=8 --p_reg_aux=5e-11 \
    --use_pixel_learning_rates"
_PHOTO = "--initial_size=450 --final_size=900 --num_steps=40 --decay_rate=0.9 --alpha=2 \
    --beta=2.5 --use_pixel_learning_rates"
PRESETS = {
    "example1": f"--layer=inception_4d/3x3_reduce {_NOISE}",
    "example2": f"--layer=inception_4c/output {_NOISE}",
    "example3": f"--layer=inception_4e/output {_NOISE}",
    "example4": f"--layer=inception_4d/3x3_reduce {_NOISE} --num_steps=200 --p_reg=1e-11 \
        --tv_reg=0.01",
    "example5": f"--model=googlenet_places205 --layer=inception_4b/3x3_reduce {_NOISE} \
        --num_steps=200 --learning_rate=5 --decay_rate=0.95 --alpha=4 --p_reg=1e-9 --beta=2.0 \
        --tv_reg=0.3",
    "example6": f"--model=googlenet_places205 --layer=inception_4c/pool {_NOISE} \
        --initialization_scale=10 --initialization_blur=1 --num_steps=150 --learning_rate=2 \
        --decay_rate=0.9 --alpha=4 --p_reg=1e-9 --tv_reg=1",
    "example7": f"--layer=inception_3a/1x1 {_CLOSE} --initial_size=450 --final_size=840 \
        --num_sizes=2 --num_steps=30",
    "example8": f"--layer=inception_3a/3x3_reduce {_CLOSE} --initial_size=450 --final_size=840 \
        --num_sizes=2 --num_steps=30",
    "example9": f"--layer=inception_4d/output {_CLOSE} --initial_size=307 --final_size=640 \
        --num_sizes=3 --num_steps=50",
    "example10": f"--layer=inception_4d/pool {_CLOSE} --initial_size=340 --final_size=1280 \
        --num_sizes=4 --num_steps=50 --p_reg=5 --tv_reg=0.1",
    "example11": f"--layer=inception_4d/pool {_EVEN} --initial_size=230 --final_size=922 \
        --num_sizes=5 --num_steps=50 --learning_rate=1 --p_reg=10 --tv_reg=1",
    "example12": f"--layer=inception_4c/output {_EVEN} --initial_size=361 --final_size=902 \
        --num_sizes=3 --num_steps=100 --learning_rate=5 --p_reg=0.5 --tv_reg=5",
    "example13": f"--layer=inception_4b/5x5_reduce {_EVEN} --initial_size=307 --final_size=614 \
        --num_sizes=3 --num_steps=100 --learning_rate=5 --p_reg=0.5 --tv_reg=0.5",
    "animals": f"--layer=inception_4c/output {_PHOTO} --num_sizes=3 --learning_rate=2.5 \
        --p_reg=0.02 --tv_reg=0.3 --alpha_aux=8 --p_reg_aux=2e-12",
    "strokes": f"--layer=conv2/3x3 {_PHOTO} --num_sizes=2 --learning_rate=2 --p_reg=0.1 \
        --tv_reg=0.2",
    "soft": f"--layer=inception_4b/output {_PHOTO} --num_sizes=2 --learning_rate=1.5 --p_reg=0.1 \
        --tv_reg=0.3 --l1_weight=0",
}
