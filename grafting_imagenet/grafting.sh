#!/bin/sh
# Trains networks that graft one another on ImageNet, or any folder with train/<class>/ and val/<class>/ images:
#
#   ./grafting.sh --data imagenet -a resnet18
#   ./grafting.sh --data imagenet -a resnet50 --num 2 --gpus-per-network 4
#   ./grafting.sh status | stop | resume DIR
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit
case " $* " in *" --help "* | *" -h "*) needs= ;; *) needs=requirements.txt ;; esac
python=$("${PYTHON:-python3}" "$here/../training/venv.py" $needs) || exit
exec "$python" "$here/../training/launch.py" grafting_imagenet "$@"
