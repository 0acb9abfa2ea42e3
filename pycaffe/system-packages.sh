#!/bin/sh
# Installs the packages of apt-packages.txt that are missing, as root or with sudo. If neither is possible, or the system
# has no apt, it prints a command to run instead. With --print, it only prints the command for all packages.
set -eu
print=${1:-}
[ -z "$print" ] || [ "$print" = --print ] || { echo "usage: $0 [--print]" >&2 && exit 2; }

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    for manager in dnf zypper pacman brew none; do
        ! command -v "$manager" >/dev/null || break
    done
    case $manager in
        dnf) line="sudo dnf install gcc-c++ python3-devel glog-devel gflags-devel protobuf-devel protobuf-compiler" ;;
        zypper) line="sudo zypper install gcc-c++ python3-devel glog-devel gflags-devel protobuf-devel" ;;
        pacman) line="sudo pacman -S --needed gcc python google-glog gflags protobuf" ;;
        brew) line="brew install gcc python glog gflags protobuf && export CMAKE_PREFIX_PATH=\$(brew --prefix)" ;;
        *) line="a C++17 compiler, Python's headers, glog, gflags and protobuf with protoc" ;;
    esac
    [ "$print" = --print ] || {
        exec >&2
        echo "This system has no apt. Install what Caffe needs with its own package manager:"
    }
    echo "    $line"
    exit 0
fi

wanted=$(sed 's/#.*//' "$(dirname "$0")/apt-packages.txt" | xargs)
if [ "$print" = --print ]; then
    echo "    sudo apt-get install $wanted"
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
    echo "Installing them needs root. Run this command, or have an administrator run it; then try again:" >&2
    echo "    sudo apt-get install$missing" >&2
    exit 1
fi
