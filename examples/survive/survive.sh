#!/usr/bin/env bash
# Kill a run with SIGKILL again and again, at random moments, and see that it ends with the bits of one left alone.
#
#     bash examples/survive/survive.sh [--kills 20] [--seed N] [--steps 300] [--output FOLDER] [--store URL]
#                                      [--spoil PLUGIN.OPTION=VALUE]
#
# The run of recipe.toml is first made once. Then it is made in another folder, and this script, which knows nothing of
# what goes on inside, kills its process group at a random moment: of four times once while it starts, once about when
# it saves, else at any moment of any step. Each time it is started again by the same command, `drivetrain run
# recipe.toml --resume`, until it ends. The SHA-256 of what both runs exported, of every file of their last checkpoints
# and of their logs must be the same; if not, the status is 1.
#
# --store has the checkpoints in an object store, such as s3://bucket/some/place. --spoil changes an option in the
# second run only: a comparison that cannot fail would prove nothing.
set -euo pipefail
export LC_ALL=C OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

kills=20 seed="$((RANDOM))" steps=300 output="" store="" spoil=()
while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || { echo "$1 takes a value" >&2; exit 2; }
    case "$1" in
        --kills) kills="$2" ;;
        --seed) seed="$2" ;;
        --steps) steps="$2" ;;
        --output) output="$2" ;;
        --store) store="${2%/}/survive-$(date +%s)-$$" ;; # nobody else's: an older run must not be gone on with
        --spoil) spoil=(--set "$2") ;;
        *) echo "unknown option $1. Known: --kills --seed --steps --output --store --spoil" >&2; exit 2 ;;
    esac
    shift 2
done
for number in "$kills" "$seed" "$steps"; do
    if ! [[ "$number" =~ ^[0-9]+$ ]]; then
        echo "--kills, --seed and --steps take whole numbers. Received: $number" >&2
        exit 2
    fi
done
work="$(mktemp -d)"
log=""
runs="${output:-$work}"
if [ -e "$runs/alone" ] || [ -e "$runs/killed" ]; then
    echo "$runs holds runs already: name another --output, or remove them" >&2
    exit 2
fi
mkdir -p "$runs"
mkfifo "$work/words"
pid=""

end() {
    local status=$?
    [ -z "$pid" ] || kill -KILL -- "-$pid" 2> /dev/null || true
    if [ "$status" -eq 0 ] || [ -n "$output" ]; then rm -rf "$work"; else echo "what was written is in $work" >&2; fi
}
trap end EXIT
trap 'exit 130' INT TERM

fail() {
    printf 'FAILED: %s\n' "$1" >&2
    [ ! -e "$log" ] || tail -n 25 "$log" >&2
    exit 1
}

clock() { now=$((${EPOCHREALTIME/./} / 1000)); } # ms

RANDOM=$((seed))
draw() { drawn=$(((RANDOM << 15 | RANDOM) % ($1 + 1))); } # uniform from 0 to $1; never in a subshell, which seeds anew

start() { # FOLDER [OPTION ...]: start the run, in a session and process group of its own, and listen to it
    local place=()
    [ -z "$store" ] || place=(--set "checkpoint.store=$store/$1")
    clock
    began="$now" last="$now" first="" step="" # first: the first step that it takes; last: when it took its latest
    setsid drivetrain run "$here/recipe.toml" --resume --set run.output="\"$runs/$1\"" --set run.steps="$steps" \
        "${place[@]}" "${@:2}" > "$work/words" 2>&1 < /dev/null &
    pid=$!
    exec 3< "$work/words"
    log="$runs/$1.log"
}

hear() { # [TIME (ms) or ""] [STEP]: 0 when the time has come or the step was taken, 1 when the run has ended before
    local left=3600000 line
    while [ -z "${2:-}" ] || [ -z "$step" ] || [ "$step" -lt "$2" ]; do
        if [ -n "${1:-}" ]; then
            clock
            left=$(($1 - now))
            [ "$left" -gt 0 ] || return 0
        fi
        status=0
        IFS= read -r -t "$((left / 1000)).$(printf %03d $((left % 1000)))" line <&3 || status=$?
        if [ "$status" -gt 128 ]; then
            [ -n "${1:-}" ] || fail "the run said nothing for an hour"
        elif [ "$status" -gt 0 ]; then
            return 1
        else
            printf '%s\n' "$line" >> "$log"
            if [[ "$line" =~ ^step\ ([0-9]+)/ ]] && [ "${BASH_REMATCH[1]}" != "$step" ]; then
                step="${BASH_REMATCH[1]}"
                clock
                first="${first:-$step}" pace=$((now - last)) last="$now"
            fi
        fi
    done
}

finish() { # wait for what `start` started
    exec 3<&-
    status=0
    { wait "$pid" || status=$?; } 2> /dev/null
    pid=""
}

unkilled() {
    finish
    fail "the run ended with status $status before kill $kill; if that is 0, give it more --steps"
}

newest() { # the step of the newest checkpoint that a reader sees
    local names=("$runs"/killed/checkpoints/step-*)
    local name="${names[-1]##*-}"
    if [[ "$name" =~ ^[0-9]+$ ]]; then seen=$((10#$name)); else seen=0; fi
}

unfinished() { # checkpoints that a reader does not see; the next start clears them away
    undone="$(cd "$runs/killed/checkpoints" 2> /dev/null && ls -d .tmp-* 2> /dev/null || true)"
}

printf '%d steps; left alone first\n' "$steps"
start alone
hear "" 1 || true
starting="$pace"
hear || true
finish
[ "$status" -eq 0 ] || fail "the run that was left alone ended with status $status"
printf 'it took %d ms to its first step, and %d ms to its last\n\n' "$starting" "$((last - began))"
printf 'the same with %d kills at random moments (--seed %d)\n' "$kills" "$seed"
printf '%6s  %-16s %-14s %-12s %s\n' kill "went on from" "killed after" "and" "what it was writing"

half=0
for ((kill = 1; kill <= kills; kill++)); do
    newest
    unfinished
    before="$seen" older="$undone"
    start killed "${spoil[@]}"
    if ((kill % 4 == 2)); then
        draw "$starting"
        hear $((began + drawn)) 1 || unkilled
    else
        hear "" 1 || unkilled
        left=$(((steps - first - 5) * 2 / (kills - kill + 3))) # a share of what is to come: later kills need some, too
        draw $((left > 0 ? left : 0))
        target=$((first + 1 + drawn)) within=200 # percent of the time that a step takes
        if ((kill % 4 == 0)); then target=$((target + target % 2)) within=50; fi # even steps are saved after their log
        hear "" "$target" || unkilled
        draw $((pace * within / 100))
        hear $((last + drawn)) $((target + 3)) || unkilled
    fi
    kill -KILL -- "-$pid"
    finish
    torn=""
    unfinished
    if [ "$undone" != "$older" ] && [ -n "$undone" ]; then torn="a checkpoint" half=$((half + 1)); fi
    if [ -z "$first" ]; then
        printf '%6d  %-16s %-14s %-12s %s\n' "$kill" "-" "its start" "$drawn ms" "$torn"
        continue
    fi
    from=$((first - 1))
    [ -n "$store" ] || [ "$from" -eq "$before" ] || fail "checkpoint $before was there, the run went on from $from"
    source="step $from"
    [ "$from" -gt 0 ] || source="the beginning"
    printf '%6d  %-16s %-14s %-12s %s\n' "$kill" "$source" "step $step" "$drawn ms" "$torn"
done

start killed "${spoil[@]}"
hear || true
finish
[ "$status" -eq 0 ] || fail "the last start ended with status $status"
printf '%6s  %-16s to its end\n' "" "step $((first - 1))"
printf '%d of %d kills left a checkpoint half written\n\n' "$half" "$kills"

for name in alone killed; do
    printf '%s\n' "$name"
    python "$here/digests.py" "$runs/$name" ${store:+"$store/$name"} | tee "$work/$name.txt"
done
if ! cmp -s "$work/alone.txt" "$work/killed.txt"; then
    echo "DIFFERENT: the run that was killed did not end as the one that was left alone" >&2
    exit 1
fi
printf 'the same, bit for bit, after %d kills\n' "$kills"
