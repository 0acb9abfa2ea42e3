#!/bin/sh
# with-progress.sh LOG COMMAND...: runs the command, whose output goes to LOG. A terminal shows how far the build of Caffe
# is, by the last [N/M] in it; if the command fails, the end of LOG is shown.
log=$1
shift
: >"$log" || exit 1

show() {
    while sleep 1; do
        step=$(grep -o '^ *\[[0-9]*/[0-9]*\]' "$log" | tail -n 1 | tr -d ' ')
        [ -z "$step" ] || printf '\r  compiling Caffe: %s ' "$step" >&2
    done
}

# The command is in the foreground: in the background it would ignore Ctrl-C.
if [ -t 2 ]; then
    show &
    trap 'kill $!; printf "\r\033[K" >&2' EXIT
fi
status=0
"$@" >"$log" 2>&1 || status=$?
[ "$status" = 0 ] || { tail -n 60 "$log"; echo "The whole log: $log"; } >&2
exit "$status"
