#!/bin/bash
#SBATCH --job-name=atlas-fever-64-shot
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
# FEVER from 64 claims.
#
# Needs: download_model.py models/atlas/xl, download_index.py indices/atlas/wiki/xl, prepare_fever.py.
# Our choice: everything as for 64 questions (nq_few_shot.sh). FEVER's test file has no labels, so dev is evaluated.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
SIZE=${SIZE:-xl}
source example_scripts/launch.sh

batch_of 32

run finetune_qa.py --task fever --name "${NAME:-fever_64_shot_$SIZE}" \
    --checkpoint_dir "$OUT" --model_path "$MODEL" --reader_model_type "$READER" --retriever_model_path "$RETRIEVER" \
    --load_index_path "$INDEX" \
    --train_data "$DATA_DIR/fever_data/train-64.jsonl" --eval_data "$DATA_DIR/fever_data/dev.jsonl" \
    --per_gpu_batch_size "$PER_GPU" --accumulation_steps "$STEPS" \
    --total_steps $((30 * STEPS)) --warmup_steps $((5 * STEPS)) --eval_freq $((15 * STEPS)) \
    --lr 4e-5 --lr_retriever 4e-5 --scheduler linear --n_context 40 --retriever_n_context 40 --text_maxlength 384 \
    --target_maxlength 10 --generation_max_length 10
