#!/bin/bash
#SBATCH --job-name=atlas-nq-few-shot
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
# NaturalQuestions from 64 examples: the paper's few-shot setting. SHOTS selects another file of prepare_qa.py.
#
# Needs: download_model.py models/atlas/xl, download_index.py indices/atlas/wiki/xl, prepare_qa.py (docs/preparing-data.md).
# After the paper (appendix, question answering): 30 updates on 32 examples, learning rates 4e-5 with 5 updates of
# warm-up and linear decay, 40 passages, query and passage together truncated to 384 tokens; only the query encoder is
# trained. All other settings are the defaults of finetune_qa.py.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
SIZE=${SIZE:-xl}
source example_scripts/launch.sh

SHOTS=${SHOTS:-64}
batch_of 32

run finetune_qa.py --name "${NAME:-nq_${SHOTS}_shot_$SIZE}" \
    --checkpoint_dir "$OUT" --model_path "$MODEL" --reader_model_type "$READER" --retriever_model_path "$RETRIEVER" \
    --load_index_path "$INDEX" \
    --train_data "$DATA_DIR/nq_data/train.$SHOTS-shot.jsonl" \
    --eval_data "$DATA_DIR/nq_data/dev.jsonl" "$DATA_DIR/nq_data/test.jsonl" \
    --per_gpu_batch_size "$PER_GPU" --accumulation_steps "$STEPS" \
    --total_steps $((30 * STEPS)) --warmup_steps $((5 * STEPS)) --eval_freq $((15 * STEPS)) \
    --lr 4e-5 --lr_retriever 4e-5 --scheduler linear --n_context 40 --retriever_n_context 40 --text_maxlength 384
