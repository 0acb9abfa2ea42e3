#!/bin/sh
# with-progress.sh LOG COMMAND...: runs the command, whose output goes to LOG. A terminal shows how far the build of Caffe
# is, by the last [N/M] of the compiler's; of a command that fails, the end of LOG is shown.
log=$1
shift
exec 3<&0 # a command in the background has no input of its own
"$@" <&3 >"$log" 2>&1 &
command=$!
trap 'kill $command; exit 130' INT TERM
while [ -t 2 ] && kill -0 $command 2>/dev/null; do
    step=$(grep -o '^ *\[[0-9]*/[0-9]*\]' "$log" | tail -n 1 | tr -d ' ')
    [ -z "$step" ] || printf '\r  compiling Caffe: %s ' "$step" >&2
    sleep 1
done
wait $command && status=0 || status=$?
[ ! -t 2 ] || printf '\r\033[K' >&2
[ "$status" = 0 ] || tail -n 60 "$log" >&2
exit "$status"
