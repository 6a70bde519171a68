# What the scripts beside this one share: they source it, and start programs with `run`.
#
#   bash example_scripts/nq_few_shot.sh --seed 1              on this machine
#   sbatch --nodes 4 example_scripts/nq_full.sh --seed 1      under SLURM, from the repository's directory
#
# Flags behind the script's name come last on every command line, so they override the script's own. These variables are
# read from the environment:
#
#   DATA_DIR      where the download and preparation scripts put everything (data, in the repository)
#   OUT           directory of all experiments ($DATA_DIR/experiments)
#   SIZE          base, large, xl or xxl: of the reader; each script has its own default
#   GPUS          processes per machine (what SLURM gives on a node, else 8)
#   PER_GPU       examples in a GPU's memory at a time (1); a script's batch is made of several of them
#   MODEL         checkpoint to start from ($DATA_DIR/models/atlas/$SIZE)
#   INDEX         index to search ($DATA_DIR/indices/atlas/wiki/$SIZE)
#   READER        hub id or directory of the T5 (google/t5-$SIZE-lm-adapt)
#   RETRIEVER     hub id or directory of the BERT (facebook/contriever)
#   TORCHRUN      how to start processes (.venv/bin/torchrun if it is there, else torchrun)
#   SAVE_SECONDS  how long a run that was asked to stop may take to save (300); less than `#SBATCH --signal` gives it
#
# Going on after a stop: ten minutes before its time is up, SLURM sends USR1 to the batch script alone (`B:`), which
# passes it on to srun, that to the torchruns, these to the processes; they end with a checkpoint. Then the job is put
# into the queue again, under the same number, and goes on there. (`--requeue` by itself covers only lost nodes and
# preemption.) An evaluation that is going on is not waited for longer than SAVE_SECONDS. Without SLURM, Ctrl-C and
# SIGTERM end a run with a checkpoint as well, and the same command goes on.

DATA_DIR=${DATA_DIR:-data}
OUT=${OUT:-$DATA_DIR/experiments}
GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}
NODES=${SLURM_NNODES:-1}
PER_GPU=${PER_GPU:-1}
MODEL=${MODEL:-$DATA_DIR/models/atlas/$SIZE}
INDEX=${INDEX:-$DATA_DIR/indices/atlas/wiki/$SIZE}
READER=${READER:-google/t5-$SIZE-lm-adapt}
RETRIEVER=${RETRIEVER:-facebook/contriever}
TORCHRUN=${TORCHRUN:-$([ -x .venv/bin/torchrun ] && echo .venv/bin/torchrun || echo torchrun)}
SAVE_SECONDS=${SAVE_SECONDS:-300}
OVERRIDES=("$@")

# batch_of N: sets STEPS, the steps (of one batch per GPU) that make an update on about N examples
batch_of() {
    STEPS=$(($1 / (PER_GPU * GPUS * NODES)))
    [ "$STEPS" -ge 1 ] || STEPS=1
}

# index_of DIRECTORY CORPUS: sets INDEX_FLAGS, to open the index there, or to build it of a corpus and keep it
index_of() {
    if [ -f "$1/index.json" ]; then
        INDEX_FLAGS=(--load_index_path "$1")
    else
        INDEX_FLAGS=(--passages "$2/text-list-100-sec.jsonl" "$2/infobox.jsonl" --save_index_path "$1")
    fi
}

# run PROGRAM.py FLAG...: on all GPUs of all nodes; ends the script if it fails or is asked to stop
run() {
    local words=("$TORCHRUN" --nproc_per_node "$GPUS" --signals-to-handle SIGTERM,SIGUSR1
        --shutdown-timeout "$SAVE_SECONDS")
    # In the background, because a shell hears no signal while it waits for a program in the foreground.
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        "${words[@]}" --standalone "$@" "${OVERRIDES[@]}" &
    else
        local hosts # not `| head -n 1`: closing the pipe early would kill scontrol, and with pipefail this script
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        # One torchrun on each node. Since SLURM 22.05 srun does not take over --cpus-per-task. A node that has saved
        # and ended must not take the others down.
        srun --ntasks "$NODES" --ntasks-per-node 1 --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 \
            "${words[@]}" --nnodes "$NODES" --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" \
            --rdzv_endpoint "${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))" "$@" "${OVERRIDES[@]}" &
    fi
    local child=$! status=0 asked=""
    trap 'asked=requeue; kill -USR1 "$child" || true' USR1
    trap 'asked=stop; kill -USR1 "$child" || true' TERM INT HUP
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # it was a signal that ended the waiting, not the program
        status=0
        wait "$child" || status=$?
    done
    trap - USR1 TERM INT HUP
    if [ "$asked" = requeue ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        echo "Asked to stop: the job goes into the queue again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    [ -z "$asked" ] || exit 143
    [ "$status" -eq 0 ] || exit "$status"
}
