#!/bin/bash
#SBATCH --job-name=cnn-vis
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.log
# One picture, or many, on several machines: starts a Dask scheduler here and a worker on each machine, makes the pictures,
# and stops them.
# Usage over ssh:     MACHINES=host1,host2 cluster.sh OPTIONS OF cnn_vis.py        (":" is this machine)
# Usage under Slurm:  sbatch --nodes=4 examples/cluster.sh OPTIONS OF cnn_vis.py   (in the folder of cnn_vis.py, or with
#                     CNN_VIS_ROOT set to it)
# Each machine needs this program at the same path, with requirements-cluster.txt installed, but no shared disk. The machines
# must reach this one at PORT (default 8786), and this one must reach them. For Dask's own settings (TLS, say), set its
# DASK_... variables.
set -eu
CNN_VIS_ROOT=${CNN_VIS_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}} # Slurm runs a copy of this file, from another folder
# shellcheck source=common.sh
. "$CNN_VIS_ROOT/examples/common.sh"
[ $# -gt 0 ] || usage 'OPTIONS OF cnn_vis.py'

folder=$(mktemp -d) run=
# shellcheck disable=SC2329
end() {
    [ -z "${scheduler:-}" ] || kill "$scheduler" 2> /dev/null || true # it also stops the workers
    wait
    rm -r "$folder"
}
trap end EXIT
trap : INT # Ctrl-C reaches the run by itself; scheduler and workers have their own sessions, and do not get it
trap '[ -z "$run" ] || kill -TERM "$run"' TERM

setsid env PYTHONSAFEPATH=1 "$python" -m dask scheduler --port "${PORT:-8786}" --no-dashboard --scheduler-file "$folder/scheduler.json" \
    > "$folder/scheduler.log" 2>&1 &
scheduler=$!
until [ -s "$folder/scheduler.json" ]; do
    kill -0 "$scheduler" 2> /dev/null || { tail -n 1 "$folder/scheduler.log" >&2 && exit 1; }
    sleep 0.1
done
address=$(evaluate 'import json, sys; print(json.load(open(sys.argv[1]))["address"])' "$folder/scheduler.json")

env --default-signal=INT "$python" "$cnn_vis" --scheduler "$address" "$@" &
run=$!

# work MACHINE COMMAND...: runs a worker there until the scheduler stops it; if it ends earlier, prints its last line.
work() {
    machine=$1
    shift
    setsid "$@" env PYTHONSAFEPATH=1 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$python" -m dask worker "$address" \
        --no-dashboard --death-timeout 60 --local-directory /tmp \
        > "$folder/$machine.log" 2>&1 || ! kill -0 "$run" 2> /dev/null ||
        tail -n 1 "$folder/$machine.log" | sed "s/^/cluster.sh: $machine: /" >&2
}
(
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        work srun srun &
    else
        IFS=, read -ra machines <<< "${MACHINES:-:}"
        for machine in "${machines[@]}"; do
            if [ "$machine" = : ]; then work "this machine" env & else work "$machine" ssh -n -o BatchMode=yes "$machine" & fi
        done
    fi
    wait
    kill -TERM "$run" 2> /dev/null && echo 'cluster.sh: all workers have ended; stopping the run' >&2
) &

status=0
while kill -0 "$run" 2> /dev/null; do # a signal interrupts the wait; the run first saves its work
    wait "$run" && status=0 || status=$?
done
exit "$status"
