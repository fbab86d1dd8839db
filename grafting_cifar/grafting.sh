#!/bin/sh
# Trains networks that graft one another on CIFAR, one process each. The first two run as they stand:
#
#   ./grafting.sh demo
#   ./grafting.sh --model mobilenetv2 --cifar 100 --num 4 --cos --difflr
#   ./grafting.sh status | stop | resume DIR
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit
case " $* " in *" --help "* | *" -h "*) needs= ;; *) needs=requirements.txt ;; esac
python=$("${PYTHON:-python3}" "$here/../training/venv.py" $needs) || exit
exec "$python" "$here/../training/launch.py" grafting_cifar "$@"
