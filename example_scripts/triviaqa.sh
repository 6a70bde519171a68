#!/bin/bash
#SBATCH --job-name=atlas-triviaqa
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#
# TriviaQA, from 64 examples or, with SHOTS=full, from all of them.
#
# Needs: download_model.py models/atlas/xl, download_index.py indices/atlas/wiki/xl, prepare_qa.py (docs/preparing-data.md).
# The settings are those of nq_few_shot.sh and nq_full.sh, as in the paper.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
SIZE=${SIZE:-xl}
source example_scripts/launch.sh

SHOTS=${SHOTS:-64}
batch_of 32

if [ "$SHOTS" = full ]; then
    training=(--train_data "$DATA_DIR/triviaqa_data/train.jsonl" --shuffle --no-query_side_retriever_training
        --total_steps $((5000 * STEPS)) --eval_freq $((500 * STEPS)) --save_freq $((500 * STEPS)) --keep_checkpoints 2
        --refresh_index "0-$((1000 * STEPS)):$((500 * STEPS)),$((1000 * STEPS))-$((5000 * STEPS)):$((2000 * STEPS))")
else
    training=(--train_data "$DATA_DIR/triviaqa_data/train.$SHOTS-shot.jsonl"
        --total_steps $((30 * STEPS)) --eval_freq $((15 * STEPS)))
fi

run finetune_qa.py --name "${NAME:-triviaqa_${SHOTS}_$SIZE}" \
    --checkpoint_dir "$OUT" --model_path "$MODEL" --reader_model_type "$READER" --retriever_model_path "$RETRIEVER" \
    --load_index_path "$INDEX" "${training[@]}" \
    --eval_data "$DATA_DIR/triviaqa_data/dev.jsonl" "$DATA_DIR/triviaqa_data/test.jsonl" \
    --per_gpu_batch_size "$PER_GPU" --accumulation_steps "$STEPS" --warmup_steps $((5 * STEPS)) \
    --lr 4e-5 --lr_retriever 4e-5 --scheduler linear --n_context 40 --retriever_n_context 40 --text_maxlength 384
