#!/usr/bin/env bash
# Trains networks that graft one another on CIFAR, one process each. The first two run as they stand:
#
#   ./grafting.sh demo
#   ./grafting.sh --model mobilenetv2 --cifar 100 --num 4 --cos --difflr
#   ./grafting.sh status DIR
#   ./grafting.sh stop DIR
#   ./grafting.sh --resume FLAGS
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../common/launch.sh" grafting_cifar log "$@"
