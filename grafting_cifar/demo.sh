# Sourced by common/launch.sh: `grafting.sh demo` trains a baseline and two grafted networks on images that are drawn on
# the spot, and compares them. Further flags go to all three.

demo_flags=(--data glyphs --model resnet20 --epochs 5 --cos)

demo() {
    local demo=checkpoint/demo marker k threads running
    thorough=yes environment "$root/requirements.txt"
    plan "${demo_flags[@]}" "$@" --num 2 --s "$demo/grafted"
    # bfloat16 halves the time where the hardware has it, and multiplies it where it is emulated.
    if [ "$gpus" -gt 0 ] || grep -q -E 'avx512_bf16|amx_bf16' /proc/cpuinfo; then demo_flags+=(--amp); fi

    marker="$demo/made by grafting.sh demo, which replaces this folder"
    if [ -e "$demo" ]; then
        [ -e "$marker" ] || fail "$PWD/$demo was not made by the demo: move it away"
        for k in baseline grafted; do
            [ -z "$("$python" "$root/common/manage.py" alive "$demo/$k")" ] \
                || fail "a demo is at work in $PWD/$demo; stop it, or wait for its end"
        done
        rm -rf -- "$demo"
    fi
    mkdir -p -- "$demo/baseline" "$demo/grafted"
    : >"$marker"

    trap 'stop_demo; exit 130' INT
    trap 'stop_demo; exit 143' TERM HUP
    say "training a baseline and two grafted networks, side by side …"
    threads=$(share_of_cores 3)
    start "baseline" 1 "$demo/baseline/1.log" "$threads" "${demo_flags[@]}" "$@" --num 1 --s "$demo/baseline" --i 1
    start "grafted 1" 2 "$demo/grafted/1.log" "$threads" "${demo_flags[@]}" "$@" --num 2 --s "$demo/grafted" --i 1
    start "grafted 2" 3 "$demo/grafted/2.log" "$threads" "${demo_flags[@]}" "$@" --num 2 --s "$demo/grafted" --i 2
    for k in "${!pids[@]}"; do
        tail -n +1 -f -- "${logs[k]}" > >(sed -u -n "s/^Network:/${names[k]}    &/p") &
        tails+=("$!")
    done
    # Looked at in turn, so that the failure of one is seen at once and not after the others, which wait for it.
    running=" ${!pids[*]} "
    while [ -n "${running// /}" ]; do
        sleep 0.2
        for k in $running; do
            kill -0 "${pids[k]}" 2>/dev/null && continue
            running=${running/ $k / }
            wait "${pids[k]}" || fail_demo "$k" $?
        done
    done
    sleep 1  # for the last lines of the logs to be shown
    kill "${tails[@]}"
    echo
    "$python" "$root/grafting_cifar/report.py" "$demo/baseline" "$demo/grafted" --plots "$demo/plots"
}

fail_demo() {
    say "${names[$1]} has failed (exit status $2):"
    tail -n 5 -- "${logs[$1]}" >&2
    stop_demo
    exit 1
}

stop_demo() {
    trap '' INT TERM HUP
    say "stopping the networks …"
    kill "${pids[@]}" 2>/dev/null || true
    wait "${pids[@]}" || true
}
