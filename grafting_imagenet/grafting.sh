#!/bin/sh
# Trains networks that graft one another on ImageNet, or any folder with train/<class>/ and val/<class>/ images:
#
#   ./grafting.sh --data imagenet -a resnet18
#   ./grafting.sh --data imagenet -a resnet50 --num 2 --gpus-per-network 4
#   ./grafting.sh status | stop | resume DIR
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit
python=$(sh "$here/../training/venv.sh") || exit
exec "$python" "$here/../training/launch.py" grafting_imagenet "$@"
