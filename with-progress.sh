#!/bin/sh
# with-progress.sh LOG COMMAND...: runs the command and writes its output to LOG. On a terminal it shows how far the build
# of Caffe is, from the last [N/M] in LOG. If the command fails, it prints the end of LOG.
log=$1
shift
: >"$log" || exit 1

show() {
    while sleep 1; do
        step=$(grep -o '^ *\[[0-9]*/[0-9]*\]' "$log" | tail -n 1 | tr -d ' ')
        [ -z "$step" ] || printf '\r  compiling Caffe: %s ' "$step" >&2
    done
}

# The command runs in the foreground, because in the background it would ignore Ctrl-C.
if [ -t 2 ]; then
    show &
    trap 'kill $!; printf "\r\033[K" >&2' EXIT
fi
status=0
"$@" >"$log" 2>&1 || status=$?
[ "$status" = 0 ] || { tail -n 60 "$log"; echo "The whole log: $log"; } >&2
exit "$status"
