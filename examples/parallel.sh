#!/bin/bash
# Many pictures, each through many layers, on all cores of one machine or several, with GNU parallel. Writes IMAGE_LAYER.png.
# Usage: parallel.sh [OPTIONS OF cnn_vis.py] ::: LAYER... ::: IMAGE...
# One job per core, each with one worker, keeps all cores busy; WORKERS=4 gives each job four, and runs a quarter as many jobs.
# MACHINES=host1,host2,: uses other machines (":" is this one). They need this program at the same path, and keep copies.
# With GPUs, run one job on each: JOBS=2 parallel.sh --gpu '{=1 $_ = slot() - 1 =}' ::: ...
# To continue after an interruption, run the same command again.
set -eu
. "$(dirname "$0")/common.sh"
case " $* " in *' ::: '*' ::: '*) ;; *) usage '[OPTIONS OF cnn_vis.py] ::: LAYER... ::: IMAGE...' ;; esac
parallel --version 2> /dev/null | grep -q '^GNU parallel' ||
    { echo 'parallel.sh: GNU parallel is needed: apt-get install parallel' >&2 && exit 1; }

workers=${WORKERS:-1} output='{2/.}_{=1 s:/:-:g =}.png' remote=()
export RSYNC_OLD_ARGS=1 # parallel quotes names as rsync before 3.2.4 needs them
[ -z "${MACHINES:-}" ] || remote=(--sshlogin "$MACHINES" --workdir . --transferfile '{2}' --return "$output")
log=parallel-$(printf '%s\n' "$@" | cksum | cut -d ' ' -f 1).log # jobs are logged by number, so each command needs its own log
exec parallel --quote --joblog "$log" --resume-failed --jobs "${JOBS:-$((100 / workers))%}" "${remote[@]}" \
    "$python" "$cnn_vis" --image '{2}' --layer '{1}' --output "$output" --num_steps 50 --learning_rate 2 --decay_rate 0.9 \
    --alpha 2 --p_reg 0.05 --beta 2.5 --tv_reg 0.5 --use_pixel_learning_rates --iter_behavior none --workers "$workers" "$@"
