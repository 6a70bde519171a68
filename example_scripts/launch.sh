# Shared by the scripts in this directory: they source it and start programs with `run`.
#
#   bash example_scripts/nq_few_shot.sh --seed 1              on this machine
#   sbatch --nodes 4 example_scripts/nq_full.sh --seed 1      under SLURM, from the repository's directory
#
# Flags after the script's name are added to the end of every command line, so they override the script's own. These
# environment variables are read:
#
#   DATA_DIR      output directory of the download and preparation scripts (data, in the repository)
#   OUT           directory of all experiments ($DATA_DIR/experiments)
#   SIZE          size of the reader: base, large, xl or xxl; each script has its own default
#   GPUS          processes per machine (the GPUs that SLURM gives on a node, else 8)
#   PER_GPU       examples per GPU and step (1); a script's batch is accumulated over several steps
#   MODEL         checkpoint to start from ($DATA_DIR/models/atlas/$SIZE)
#   INDEX         index to search ($DATA_DIR/indices/atlas/wiki/$SIZE)
#   READER        hub id or directory of the T5 (google/t5-$SIZE-lm-adapt)
#   RETRIEVER     hub id or directory of the BERT (facebook/contriever)
#   TORCHRUN      the launcher (.venv/bin/torchrun if it exists, else torchrun)
#   SAVE_SECONDS  how long a run may take to stop and save (300); must be less than the time in `#SBATCH --signal`
#
# Resuming: ten minutes before the time limit, SLURM sends USR1 to the batch script only (`B:`), which passes it on
# through srun and torchrun to the processes. They save a checkpoint and end. Then the job is requeued under the same
# number and resumes when it starts again. (`--requeue` alone only covers lost nodes and preemption.) A running
# evaluation is stopped after SAVE_SECONDS. Without SLURM, Ctrl-C and SIGTERM also end a run with a checkpoint, and the
# same command resumes it. (`srun python train.py` with a task for each GPU works as well; these scripts use torchrun, which
# passes signals on everywhere.)

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

# batch_of N: sets STEPS, the number of steps (one batch per GPU) that are accumulated for a batch of about N examples
batch_of() {
    STEPS=$(($1 / (PER_GPU * GPUS * NODES)))
    [ "$STEPS" -ge 1 ] || STEPS=1
}

# index_of DIRECTORY CORPUS: sets INDEX_FLAGS to load the index in DIRECTORY, or to build it from CORPUS and save it
index_of() {
    if [ -f "$1/index.json" ]; then
        INDEX_FLAGS=(--load_index_path "$1")
    else
        INDEX_FLAGS=(--passages "$2/text-list-100-sec.jsonl" "$2/infobox.jsonl" --save_index_path "$1")
    fi
}

# run PROGRAM.py FLAG...: runs it on all GPUs of all nodes; ends the script if it fails or is asked to stop
run() {
    local words=("$TORCHRUN" --nproc_per_node "$GPUS" --signals-to-handle SIGTERM,SIGUSR1
        --shutdown-timeout "$SAVE_SECONDS")
    # In the background, because a shell does not handle signals while it waits for a program in the foreground.
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        "${words[@]}" --standalone "$@" "${OVERRIDES[@]}" &
    else
        local hosts # not `| head -n 1`: closing the pipe early would kill scontrol, and with pipefail this script
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        # One torchrun per node. Since SLURM 22.05, srun does not inherit --cpus-per-task. A node that has saved and
        # ended must not end the others.
        srun --ntasks "$NODES" --ntasks-per-node 1 --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 \
            "${words[@]}" --nnodes "$NODES" --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" \
            --rdzv_endpoint "${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))" "$@" "${OVERRIDES[@]}" &
    fi
    local child=$! status=0 asked=""
    trap 'asked=requeue; kill -USR1 "$child" || true' USR1
    trap 'asked=stop; kill -USR1 "$child" || true' TERM INT HUP
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal has interrupted `wait`, and the program is still running
        status=0
        wait "$child" || status=$?
    done
    trap - USR1 TERM INT HUP
    if [ "$asked" = requeue ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        echo "Asked to stop: the job is requeued"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    [ -z "$asked" ] || exit 143
    [ "$status" -eq 0 ] || exit "$status"
}
