#!/bin/bash
# Many pictures, each through many layers, on all cores of one machine or several, with GNU parallel. Writes IMAGE_LAYER.png.
# Usage: parallel.sh [OPTIONS OF cnn_vis.py] ::: LAYER... ::: IMAGE...
# One worker for a job and a job for each core leave no core waiting; WORKERS=4 gives a job four, and runs a fourth of the jobs.
# MACHINES=host1,host2,: also runs on others (":" is this one). They need this program at the same path, and keep copies.
# With GPUs, one job for each: JOBS=2 parallel.sh --gpu '{=1 $_ = slot() - 1 =}' ::: ...
# The same command given again goes on where it stopped.
set -eu
. "$(dirname "$0")/common.sh"
case " $* " in *' ::: '*' ::: '*) ;; *) usage '[OPTIONS OF cnn_vis.py] ::: LAYER... ::: IMAGE...' ;; esac
parallel --version 2> /dev/null | grep -q '^GNU parallel' ||
    { echo 'parallel.sh: GNU parallel is needed: apt-get install parallel' >&2 && exit 1; }

workers=${WORKERS:-1} output='{2/.}_{=1 s:/:-:g =}.png' remote=()
export RSYNC_OLD_ARGS=1 # parallel quotes names for rsync as those before 3.2.4 want it
[ -z "${MACHINES:-}" ] || remote=(--sshlogin "$MACHINES" --workdir . --transferfile '{2}' --return "$output")
log=parallel-$(printf '%s\n' "$@" | cksum | cut -d ' ' -f 1).log # it tells jobs by their number, so each command has its own
exec parallel --quote --joblog "$log" --resume-failed --jobs "${JOBS:-$((100 / workers))%}" "${remote[@]}" \
    "$python" "$cnn_vis" --image '{2}' --layer '{1}' --output "$output" --num_steps 50 --learning_rate 2 --decay_rate 0.9 \
    --alpha 2 --p_reg 0.05 --beta 2.5 --tv_reg 0.5 --use_pixel_learning_rates --iter_behavior none --workers "$workers" "$@"
