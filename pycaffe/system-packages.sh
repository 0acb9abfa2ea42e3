#!/bin/sh
# Installs the packages of apt-packages.txt that are missing, as root or through sudo; without rights it prints the line
# for someone who has them. On systems without apt it says what is needed and leaves the rest to you.
set -eu
wanted=$(sed 's/#.*//' "$(dirname "$0")/apt-packages.txt")

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    echo "No apt here. Caffe needs a C++17 compiler, Python's headers, glog, gflags and protobuf with protoc." >&2
    exit 0
fi

missing=
for package in $wanted; do
    dpkg-query -W -f '${Status}\n' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

install="apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends$missing >/dev/null"
echo "Installing system packages:$missing" >&2
if [ "$(id -u)" = 0 ]; then
    sh -c "$install" >&2
elif command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
    sudo sh -c "$install" >&2
else
    echo "This takes rights you do not have. Have this line run, then try again:" >&2
    echo "    sudo apt-get install$missing" >&2
    exit 1
fi
