#!/bin/bash
#SBATCH --job-name=atlas-mmlu-zero-shot
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
# MMLU without any training.
#
# Needs: download_model.py models/atlas/xl, download_index.py indices/atlas/wiki/xl, prepare_mmlu.py.
# After the paper: the answer is the letter that is most probable over the four rotations of the options ("debiased").
# Our choice: 30 passages, 512 tokens.
# Score by subject and category: evaluation_scripts/evaluate_mmlu_predictions.py, given the result file.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
SIZE=${SIZE:-xl}
source example_scripts/launch.sh

run evaluate.py --task multiple_choice --write_results --name "${NAME:-mmlu_zero_shot_$SIZE}" \
    --checkpoint_dir "$OUT" --model_path "$MODEL" --reader_model_type "$READER" --retriever_model_path "$RETRIEVER" \
    --load_index_path "$INDEX" --eval_data "$DATA_DIR/data/mmlu_data/full/combined_test.jsonl" \
    --multiple_choice_num_options 4 --multiple_choice_eval_permutations cyclic \
    --n_context 30 --text_maxlength 512 --target_maxlength 16 --generation_max_length 16 --precision bf16
