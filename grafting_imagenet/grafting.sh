#!/usr/bin/env bash
# Trains networks that graft one another on ImageNet, or any folder with train/<class>/ and val/<class>/ images:
#
#   ./grafting.sh --data imagenet -a resnet18
#   ./grafting.sh --data imagenet -a resnet50 --num 2 --gpus-per-network 4
#   ./grafting.sh status DIR
#   ./grafting.sh stop DIR
#   ./grafting.sh --resume auto FLAGS
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../common/launch.sh" grafting_imagenet out "$@"
