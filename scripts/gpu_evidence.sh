#!/usr/bin/env bash
# The whole list of what is to be shown on a card, unattended: tests, probe, searches, a recorded grid, the study, memory
# that runs out, accuracy. Every step's output is in $OUT when it ends; what is done is not done again, so that the same
# command goes on after a cut.
#
#   OUT=evidence scripts/gpu_evidence.sh                     all of it, about half an hour on an H100
#   OUT=evidence STEPS="probe search-imdb" BESIDE= LAST= scripts/gpu_evidence.sh
#   OUT=/tmp/e PACK=e.tgz UNTIL=420 SEARCH_S=100 scripts/gpu_evidence.sh   what fits into seven minutes, in one file
#   OUT=rehearsal REHEARSE=1 DEVICE=cpu scripts/gpu_evidence.sh   every step in small, to see that it runs
#
# OUT        folder for results (evidence)            DEVICE    cuda, or cpu to rehearse
# STEPS      which are timed, one after another       BESIDE    which are not, all at once after them
# LAST       what comes then, nothing beside it: the accuracy runs side by side, what fills the card
# SEARCH_S   for each search (300), less where UNTIL leaves less    PLANNED   epochs that searches plan for (the recipe's)
# REVIEWS    a folder with the real reviews           EPOCHS    of the accuracy runs (5)
# GRID_MIN   minutes for the recorded grid (8)   STUDY_STEPS   steps of each of the study's runs (the study's own)
# UNTIL      seconds in all: a step that does not end by then is interrupted, as by ^C
#            (an H100 took: probe 26 to 41 s, a search its budget and 35, tests 120, accuracy 30 and, plain, 130)
# PACK       an archive of all results but the cache and weights, written anew after every step
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-evidence}
DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python3}
REHEARSE=${REHEARSE:-}
SEARCH_S=${SEARCH_S:-300}
EPOCHS=${EPOCHS:-5}
REVIEWS=${REVIEWS:-}
STEPS=${STEPS-versions probe compare compare-lm@128 search-imdb search-cifar10 search-lm search-lm@128 study grid own trainers}
BESIDE=${BESIDE-accuracy-none accuracy-best tests budget replay}
LAST=${LAST-accuracy too-big}
UNTIL=${UNTIL:-86400}
PACK=${PACK:-}
PLANNED=${PLANNED:-}
mkdir -p "$OUT/done"
export AUTOTUNE_CACHE=${AUTOTUNE_CACHE:-$OUT/cache}
PROFILES=$OUT/profiles
left() { echo $((UNTIL - SECONDS)); }
limited() { timeout -s INT -k 10 "$(($(left) > 0 ? $(left) : 1))" "$@"; }
autotune() { limited "$PYTHON" -m autotune "$@"; }
search() {  # within its budget and what it overruns by: cut off, it has no last test
    local spare=$(($(left) - 40)) budget=()
    [ -z "$REHEARSE" ] && budget=(--budget "$((spare < SEARCH_S ? (spare > 30 ? spare : 30) : SEARCH_S))s")
    autotune search "${budget[@]}" --device "$DEVICE" "$@" "${search_args[@]}"
}

# small: a rehearsal's sizes
search_args=(${PLANNED:+--epochs "$PLANNED"})
study_args=(--max-batch ${STUDY_STEPS:+--steps "$STUDY_STEPS"})
train_args=(--epochs "$EPOCHS")
grid_minutes=${GRID_MIN:-8}
replay_args=(--seeds 100)
trainers_args=(--budget 40s --rounds 3)
test_args=(-p no:benchmark tests/gpu tests/backends) # the backends' contract has no mark of its own
if [ -n "$REHEARSE" ]; then
    search_args=(--trials 2 --limit 256 --epochs 1)
    study_args=(--steps 2 --only baseline,checkpointing --batch-size 2 --batch-size 4 --limit 64)
    train_args=(--epochs 1 --limit 64)
    grid_minutes=0.5
    replay_args=(--seeds 2 --methods autotune,random)
    trainers_args=(--budget 20s --rounds 2)
    test_args=(tests/backends)
    STEPS=${STEPS//lm@128/lm@2} # whose plain baseline takes 28 GiB
fi
data_args=()
[ -n "$REVIEWS" ] && data_args=(--data "$REVIEWS")
bf16=precision=bf16,attention=sdpa,padding=buckets,optimizer=fused
flash=precision=bf16,attention=sdpa_flash,optimizer=fused
recorded=graphs=step,compile=default,compile_scope=blocks
compared=(none "$bf16" "$bf16,graphs=step" "$bf16,graphs=step,compile=default")
[ "$DEVICE" = cpu ] && compared=(none "$bf16") recorded=padding=max

step() {  # what one step runs; its output is its evidence
    case $1 in
    versions)
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv 2> /dev/null || echo "no nvidia-smi"
        "$PYTHON" -c "import platform, torch; print(platform.python_version(), torch.__version__, torch.version.cuda)"
        git rev-parse HEAD 2> /dev/null || true
        ;;
    tests) limited "$PYTHON" -m pytest -q -p no:cacheprovider "${test_args[@]}" ;;
    probe) autotune probe --device "$DEVICE" --refresh ;;
    compare) limited "$PYTHON" -m benchmarks.compare "${data_args[@]}" --rounds 4 "${compared[@]}" ;;
    compare-*)  # in turns, with the kernel that takes no mask
        limited "$PYTHON" -m benchmarks.compare --model "${1#compare-}" --rounds 4 none "$flash" "$flash,$recorded"
        ;;
    own)  # a user's own data, Trainer and LightningModule
        local name own_failed=0
        for name in my_images transformers_trainer lightning_module; do
            search --model "examples/$name.py:workload" --profiles "$OUT/own" || own_failed=1
        done
        return $own_failed
        ;;
    search-*)
        local data=()
        [ "$1" = search-imdb ] && data=("${data_args[@]}")
        search --model "${1#search-}" --profiles "$PROFILES" "${data[@]}" &&
            autotune report "${1#search-}" --device "$DEVICE" --profiles "$PROFILES" -o "$OUT/$1.html"
        ;;
    study)
        autotune study --model lm --device "$DEVICE" --output "$OUT/study.json" --csv "$OUT/study.csv" "${study_args[@]}" &&
            autotune report "$OUT/study.json" -o "$OUT/study.html"
        ;;
    grid)
        limited "$PYTHON" -m benchmarks.record --model imdb --device "$DEVICE" --minutes "$grid_minutes" &&
            cp benchmarks/grids/imdb-"$DEVICE"-* "$OUT"/
        ;;
    replay) limited "$PYTHON" -m benchmarks.replay "${replay_args[@]}" ;;
    trainers) limited "$PYTHON" -m benchmarks.trainers "${trainers_args[@]}" ;;
    budget)  # real out-of-memory: the search goes on, and ends within its budget
        search --model imdb --profiles "$OUT/budget" --memory-budget 2GiB "${data_args[@]}"
        ;;
    too-big)  # a batch that no card holds: a row with its reason, the smaller ones measured
        autotune study --study precision --model lm --device "$DEVICE" --output "$OUT/too-big.json" --steps 2 \
            --only fp32 --limit 65536 --batch-size 8 --batch-size "${TOO_BIG:-4096}"
        ;;
    accuracy)
        autotune compare "$OUT/accuracy-none" "$OUT/accuracy-best" &&
            autotune report "$OUT/accuracy-none" "$OUT/accuracy-best" -o "$OUT/accuracy.html"
        ;;
    accuracy-*)
        if [ -e "$OUT/$1/checkpoint.pt" ]; then
            autotune train --model imdb --device "$DEVICE" --resume "$OUT/$1"
        else
            chosen=(--profiles "$PROFILES")
            [ "$1" = accuracy-none ] && chosen=(--profile none)
            autotune train --model imdb --device "$DEVICE" --run "$OUT/$1" "${chosen[@]}" "${data_args[@]}" "${train_args[@]}"
        fi
        ;;
    *) echo "there is no step $1; there are $STEPS $BESIDE $LAST" >&2 && return 2 ;;
    esac
}

run() {  # a step that is not done yet, and what became of it
    local name=$1 start=$SECONDS status
    [ -e "$OUT/done/$name" ] && echo "$name: done before" && return 0
    [ "$(left)" -le 0 ] && echo "$name: no time left" && return 1
    step "$name" > "$OUT/$name.txt" 2> "$OUT/$name.err"
    status=$?
    if [ $status = 0 ]; then
        touch "$OUT/done/$name"
        echo "$name: ok, $((SECONDS - start)) s"
    else
        echo "$name: status $status, $((SECONDS - start)) s: $(tail -n 1 "$OUT/$name.err" | cut -c1-200)"
    fi
    return $status
}

pack() {
    [ -n "$PACK" ] || return 0
    tar czf "$PACK.new" --exclude=cache --exclude='*.pt' -C "$OUT" . 2> /dev/null
    [ $? -le 1 ] && mv "$PACK.new" "$PACK" # 1: a file was written to meanwhile
}

failed=0
for name in $STEPS; do
    run "$name" || failed=1
    pack
done
set -m  # without job control, what runs in the background never hears an interrupt
children=()
for name in $BESIDE; do
    run "$name" &
    children+=($!)
done
for child in ${children[@]+"${children[@]}"}; do
    wait "$child" || failed=1
    pack
done
for name in $LAST; do
    run "$name" || failed=1
    pack
done
exit $failed
