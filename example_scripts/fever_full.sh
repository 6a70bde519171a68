#!/bin/bash
#SBATCH --job-name=atlas-fever-full
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
# FEVER from all claims.
#
# Needs: download_model.py models/atlas/xl, download_index.py indices/atlas/wiki/xl, prepare_fever.py.
# Our choice: everything as for all questions (nq_full.sh). FEVER's test file has no labels, so dev is evaluated.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
SIZE=${SIZE:-xl}
source example_scripts/launch.sh

batch_of 32

run finetune_qa.py --task fever --name "${NAME:-fever_full_$SIZE}" \
    --checkpoint_dir "$OUT" --model_path "$MODEL" --reader_model_type "$READER" --retriever_model_path "$RETRIEVER" \
    --load_index_path "$INDEX" --target_maxlength 10 --generation_max_length 10 \
    --train_data "$DATA_DIR/fever_data/train.jsonl" --eval_data "$DATA_DIR/fever_data/dev.jsonl" \
    --per_gpu_batch_size "$PER_GPU" --accumulation_steps "$STEPS" --shuffle \
    --total_steps $((5000 * STEPS)) --warmup_steps $((5 * STEPS)) \
    --eval_freq $((500 * STEPS)) --save_freq $((500 * STEPS)) --keep_checkpoints 2 \
    --no-query_side_retriever_training \
    --refresh_index "0-$((1000 * STEPS)):$((500 * STEPS)),$((1000 * STEPS))-$((5000 * STEPS)):$((2000 * STEPS))" \
    --lr 4e-5 --lr_retriever 4e-5 --scheduler linear --n_context 40 --retriever_n_context 40 --text_maxlength 384
