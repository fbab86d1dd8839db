#!/usr/bin/env bash
# Starts the networks of a run, shows how they are, and stops them. grafting_cifar/grafting.sh and
# grafting_imagenet/grafting.sh call it:
#
#   common/launch.sh FOLDER SUFFIX ARGUMENT...
#
# FOLDER/grafting.py trains one network, FOLDER/demo.sh is the demo, if there is one, the logs are DIR/{i}.SUFFIX, and
# the ARGUMENTs are those of grafting.sh.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

folder=$root/$1 suffix=$2
shift 2
script=$folder/grafting.py

usage() {
    cat <<USAGE
usage: grafting.sh [FLAG...]            start the networks of a run in the background, and follow their logs
       grafting.sh --resume [FLAG...]   start those of its networks again that are neither alive nor done
       grafting.sh status DIR           one line per network: state, epoch, accuracy, best, last seen
       grafting.sh stop DIR             end the networks; --resume continues them
USAGE
    [ ! -e "$folder/demo.sh" ] || cat <<USAGE
       grafting.sh demo [FLAG...]       train a baseline and two grafted networks in a few minutes, and compare them
USAGE
    cat <<USAGE

All networks of a run share its save directory DIR. --num says how many they are (1: a baseline), and every other
FLAG is passed on to grafting.py, which explains them all:
       python $(printf %q "$script") --help
USAGE
    [ "${folder##*/}" != grafting_imagenet ] || cat <<USAGE
With --gpus-per-network G each network has G GPUs of its own, a process each under torchrun; without GPUs, G processes.
USAGE
}

main() {
    case ${1-} in
        -h | --help) usage ;;
        status | stop)
            [ $# -ge 2 ] || fail "grafting.sh $1: expected the save directory of a run (see grafting.sh --help)" 2
            users_python
            exec "$python" "$root/common/manage.py" "$@" ;;
        demo)
            [ -e "$folder/demo.sh" ] || fail "there is no demo here, but in $root/grafting_cifar/grafting.sh" 2
            shift
            source "$folder/demo.sh"
            demo "$@" ;;
        *) launch "$@" ;;
    esac
}

# launch FLAG...: starts the networks of a run; on a terminal it then follows their logs, elsewhere it returns.
launch() {
    local pending threads i known=()
    if has --i "$@"; then
        fail "grafting.sh starts all networks of a run: --i is for grafting.py alone" 2
    fi
    take_ranks "$@"
    set -- "${flags[@]}"
    environment "$root/requirements.txt"
    plan "$@"
    pending=" $("$python" "$root/common/manage.py" pending "$directory" "$num") "
    if ! continues "$@"; then
        for ((i = 1; i <= num; i++)); do
            if [ -e "$directory/metrics$i.csv" ] || [[ $pending != *" $i "* ]]; then
                fail "network $i runs or has run in $directory: continue it with --resume, or choose another directory (--s)"
            fi
        done
    elif [[ $pending != *[0-9]* ]]; then
        say "nothing to start: every network in $directory is alive or done"
        exit 0
    fi
    mkdir -p -- "$directory"
    has --s "$@" || known+=(--s "$directory")
    has --num "$@" || known+=(--num "$num")
    threads=$(share_of_cores $((num * ranks)))
    for i in $pending; do
        start "network $i" "$i" "$directory/$i.$suffix" "$threads" "${known[@]}" "$@" --i "$i"
    done
    say "logs: $directory/*.$suffix"
    say_how
    if [ -t 1 ]; then follow; else watch_the_start; fi
}

say_how() {
    say "see them: $(printf %q "$folder/grafting.sh") status $(printf %q "$directory")"
    say "end them: $(printf %q "$folder/grafting.sh") stop $(printf %q "$directory")"
}

# has NAME FLAG...: whether NAME is among the flags.
has() {
    local flag
    for flag in "${@:2}"; do
        case $flag in "$1" | "$1="*) return 0 ;; esac
    done
    return 1
}

# continues FLAG...: whether a run is to go on: --resume, or --resume auto; with a file's name it is a new one's start.
continues() {
    [[ " $* " =~ " --resume"([ =]auto)?" "(-|$) ]]
}

# take_ranks FLAG...: sets $ranks, how many processes, and GPUs, each network has, and $flags, those for grafting.py.
ranks=1 flags=()
take_ranks() {
    while [ $# -gt 0 ]; do
        case $1 in
            --gpus-per-network=*) ranks=${1#*=} ;;
            --gpus-per-network)
                ranks=${2-}
                [ $# -lt 2 ] || shift ;;
            *) flags+=("$1") ;;
        esac
        shift
    done
    [[ $ranks =~ ^[1-9][0-9]{0,3}$ ]] || fail "grafting.sh: --gpus-per-network: got '$ranks', expected a number of GPUs" 2
}

# plan FLAG...: has grafting.py check the flags, which ends here with its one line if one is wrong; sets $directory, $num
# and $gpus, the number of GPUs to spread over (0: use the CPU), and their names in $devices.
plan() {
    local lines i
    lines=$(WORLD_SIZE=$ranks "$python" "$script" "$@" --plan) || exit
    { IFS= read -r directory; read -r num; read -r gpus; } <<<"$lines"
    IFS=, read -r -a devices <<<"${CUDA_VISIBLE_DEVICES-}"
    if [ ${#devices[@]} -eq 0 ]; then
        for ((i = 0; i < gpus; i++)); do devices+=("$i"); done
    fi
    if [ "$gpus" -gt 0 ] && [ "$ranks" -gt "$gpus" ]; then
        fail "grafting.sh: --gpus-per-network: got $ranks, but this machine has $gpus" 2
    fi
}

# share_of_cores N: the threads for each of N processes.
share_of_cores() {
    local threads=$(($(nproc) / $1))
    echo $((threads > 0 ? threads : 1))
}

# Of the processes that were started: their ids, names, logs, and how long the logs were before. Then those that
# show the logs.
pids=() names=() logs=() sizes=() tails=()
trap 'kill "${tails[@]}" 2>/dev/null || true' EXIT

# start NAME K LOG THREADS FLAG...: starts a network on the K-th GPU, or $ranks GPUs, counted round and round, or on so
# many threads. It outlives this script and its terminal; in a process group of its own, it does not hear Ctrl-C either.
start() {
    local variables=() command=("$python" "$script" "${@:5}") own=() k
    if [ "$gpus" -gt 0 ]; then
        for ((k = ($2 - 1) * ranks; k < $2 * ranks; k++)); do own+=("${devices[$((k % gpus))]}"); done
        variables=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${own[*]}")")
    elif [ -z "${OMP_NUM_THREADS-}" ]; then
        variables=("OMP_NUM_THREADS=$4")
    fi
    if [ "$ranks" -gt 1 ]; then
        # It would undo nohup; and, but for the two dashes, it would take --s for the start of a flag of its own.
        variables+=("TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT")
        command=("$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -- "$script" "${@:5}")
    fi
    printf '%s>>%q 2>&1 </dev/null &\n' "$(printf '%q ' "${variables[@]}" nohup "${command[@]}")" "$3" >&2
    sizes+=("$(stat -c %s -- "$3" 2>/dev/null || echo 0)")
    set -m
    env "${variables[@]}" nohup "${command[@]}" >>"$3" 2>&1 </dev/null &
    set +m
    pids+=("$!") names+=("$1") logs+=("$3")
}

# follow: shows what is written to the logs until the networks have ended; Ctrl-C ends the following alone.
follow() {
    local k status=0 result
    trap 'say; say "no longer following; the training goes on"; say_how; exit 130' INT
    say "following the logs; Ctrl-C ends that, not the training"
    for k in "${!pids[@]}"; do
        tail -c +$((sizes[k] + 1)) -f -- "${logs[k]}" &
        tails+=("$!")
    done
    for k in "${!pids[@]}"; do
        wait "${pids[k]}" && result=0 || result=$?
        [ $status -ne 0 ] || status=$result
    done
    sleep 1  # tail looks at the logs once a second where it is not told of changes
    "$python" "$root/common/manage.py" status "$directory" || true
    exit $status
}

# watch_the_start: a process that ends at once has something to say that nobody would see.
watch_the_start() {
    local k alive
    for _ in {1..10}; do
        sleep 0.2
        alive=0
        for k in "${!pids[@]}"; do
            if kill -0 "${pids[k]}" 2>/dev/null; then
                alive=1
            elif ! wait "${pids[k]}"; then
                say "${names[k]} has failed:"
                tail -n 5 -- "${logs[k]}" >&2
                exit 1
            fi
        done
        [ $alive = 1 ] || return 0
    done
}

main "$@"; exit  # on one line: bash would read on in a file that may have changed during a long run
