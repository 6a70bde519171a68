#!/bin/bash
#SBATCH --job-name=atlas-retrieve-only
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
# The retriever alone, without a reader: the first K passages for each question go to the result file. If the questions
# have answers, the log's last lines give recall@k and MRR. QUESTIONS is another file, K another number.
#
# Needs: download_model.py models/atlas/xl, download_index.py indices/atlas/wiki/xl, prepare_qa.py.
# Our choice: 100 passages, queries of 384 tokens at most.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
SIZE=${SIZE:-xl}
source example_scripts/launch.sh

K=${K:-100}
QUESTIONS=${QUESTIONS:-$DATA_DIR/nq_data/test.jsonl}

run evaluate.py --task qa --retrieve_only --write_results --name "${NAME:-retrieve_only_$SIZE}" \
    --checkpoint_dir "$OUT" --model_path "$MODEL" --retriever_model_path "$RETRIEVER" \
    --load_index_path "$INDEX" --eval_data "$QUESTIONS" --n_context "$K" --text_maxlength 384 --per_gpu_batch_size 16
