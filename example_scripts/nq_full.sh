#!/bin/bash
#SBATCH --job-name=atlas-nq-full
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
# NaturalQuestions from all training examples.
#
# Needs: download_model.py models/atlas/xl, download_index.py indices/atlas/wiki/xl, prepare_qa.py (docs/preparing-data.md).
# After the paper (appendix, question answering): 5,000 updates on 32 examples, learning rates 4e-5 with 5 updates of
# warm-up and linear decay, both encoders are trained, the index is refreshed every 500 updates up to the 1,000th and
# every 2,000 after it, 40 passages, 384 tokens. A checkpoint and an evaluation every 500 updates: report the test
# result of the step that is best on dev. On one node of 8 GPUs a refresh takes long; `sbatch --nodes 4` is our choice.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
SIZE=${SIZE:-xl}
source example_scripts/launch.sh

batch_of 32

run finetune_qa.py --name "${NAME:-nq_full_$SIZE}" \
    --checkpoint_dir "$OUT" --model_path "$MODEL" --reader_model_type "$READER" --retriever_model_path "$RETRIEVER" \
    --load_index_path "$INDEX" \
    --train_data "$DATA_DIR/nq_data/train.jsonl" \
    --eval_data "$DATA_DIR/nq_data/dev.jsonl" "$DATA_DIR/nq_data/test.jsonl" \
    --per_gpu_batch_size "$PER_GPU" --accumulation_steps "$STEPS" --shuffle \
    --total_steps $((5000 * STEPS)) --warmup_steps $((5 * STEPS)) \
    --eval_freq $((500 * STEPS)) --save_freq $((500 * STEPS)) --keep_checkpoints 2 \
    --no-query_side_retriever_training \
    --refresh_index "0-$((1000 * STEPS)):$((500 * STEPS)),$((1000 * STEPS))-$((5000 * STEPS)):$((2000 * STEPS))" \
    --lr 4e-5 --lr_retriever 4e-5 --scheduler linear --n_context 40 --retriever_n_context 40 --text_maxlength 384
