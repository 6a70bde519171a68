#!/bin/bash
#SBATCH --job-name=atlas-mmlu-5-shot-multitask
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
# MMLU, one model from the five examples of all 57 subjects.
#
# Needs: download_model.py models/atlas/xl, download_index.py indices/atlas/wiki/xl, prepare_mmlu.py.
# After the paper: the answer is the letter that is most probable over the four rotations of the options ("debiased").
# Our choice: updates on 64 examples, 250 for xxl, 500 for xl, 2,000 for smaller readers; learning rates 5e-5 and 1e-5
# with linear decay after a warm-up of a twentieth; 30 passages, 512 tokens.
# Score by subject and category: evaluation_scripts/evaluate_mmlu_predictions.py, given the result file.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
SIZE=${SIZE:-xl}
source example_scripts/launch.sh

case $SIZE in xxl) UPDATES=${UPDATES:-250} ;; xl) UPDATES=${UPDATES:-500} ;; *) UPDATES=${UPDATES:-2000} ;; esac
batch_of 64
data=$DATA_DIR/data/mmlu_data/5-shot-multitask

run train.py --task multiple_choice --write_results --name "${NAME:-mmlu_5_shot_multitask_$SIZE}" \
    --checkpoint_dir "$OUT" --model_path "$MODEL" --reader_model_type "$READER" --retriever_model_path "$RETRIEVER" \
    --load_index_path "$INDEX" --shuffle --train_data "$data/train.jsonl" \
    --eval_data "$data/combined_valid.jsonl" "$data/combined_test.jsonl" \
    --per_gpu_batch_size "$PER_GPU" --accumulation_steps "$STEPS" \
    --total_steps $((UPDATES * STEPS)) --warmup_steps $((UPDATES * STEPS / 20)) --log_freq $((10 * STEPS)) \
    --eval_freq $((UPDATES * STEPS / 2)) --save_freq $((UPDATES * STEPS / 10)) --keep_checkpoints 2 \
    --multiple_choice_num_options 4 --multiple_choice_eval_permutations cyclic \
    --n_context 30 --text_maxlength 512 --target_maxlength 16 --generation_max_length 16 --precision bf16 \
    --multiple_choice_train_permutations cyclic --retriever_n_context 30 \
    --train_retriever --query_side_retriever_training --gold_score_mode ppmean \
    --lr 5e-5 --lr_retriever 1e-5 --scheduler linear --dropout 0.1 --weight_decay 0.01 \
    --shard_optim --shard_grads --use_gradient_checkpoint_reader --use_gradient_checkpoint_retriever
