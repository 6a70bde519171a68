#!/bin/bash
#SBATCH --job-name=atlas-mmlu-5-shot
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
# MMLU, a model for each of its 57 subjects from five examples. SUBJECTS selects some of them.
#
# Needs: download_model.py models/atlas/xl, download_index.py indices/atlas/wiki/xl, prepare_mmlu.py, and the index
# converted once for all subjects: convert_index.py $DATA_DIR/indices/atlas/wiki/xl $DATA_DIR/indices/xl_flat.
# After the paper: the answer is the letter that is most probable over the four rotations of the options ("debiased").
# Our choice: updates on 64 examples, 16 for xxl, 32 for xl, 64 for smaller readers; learning rates 5e-5 and 1e-5, 5
# updates of warm-up; 30 passages, 512 tokens.
# 57 checkpoints take a lot of space: REMOVE_MODELS=1 removes each one after its subject has been evaluated. A job that
# was stopped resumes with the first subject that has no results.
# Score all subjects: evaluation_scripts/evaluate_mmlu_predictions.py, given the directory $OUT/{name}.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
SIZE=${SIZE:-xl}
DATA_DIR=${DATA_DIR:-data}
INDEX=${INDEX:-$DATA_DIR/indices/${SIZE}_flat}
source example_scripts/launch.sh

case $SIZE in xxl) UPDATES=${UPDATES:-16} ;; xl) UPDATES=${UPDATES:-32} ;; *) UPDATES=${UPDATES:-64} ;; esac
batch_of 64
OUT=$OUT/${NAME:-mmlu_5_shot_$SIZE}
data=$DATA_DIR/data/mmlu_data/5-shot
SUBJECTS=${SUBJECTS:-$(cd "$data/train" && ls | sed 's/\.train\.jsonl$//')}

for subject in $SUBJECTS; do
    if ls "$OUT/$subject/$subject.test-step-"*.jsonl >/dev/null 2>&1; then continue; fi
    run train.py --task multiple_choice --write_results --name "$subject" \
        --checkpoint_dir "$OUT" --model_path "$MODEL" --load_index_path "$INDEX" \
        --reader_model_type "$READER" --retriever_model_path "$RETRIEVER" \
        --train_data "$data/train/$subject.train.jsonl" --eval_data "$data/test/$subject.test.jsonl" \
        --per_gpu_batch_size "$PER_GPU" --accumulation_steps "$STEPS" \
        --total_steps $((UPDATES * STEPS)) --warmup_steps $((5 * STEPS)) --log_freq $((4 * STEPS)) \
        --eval_freq $((UPDATES * STEPS)) --save_freq $((UPDATES * STEPS)) \
        --multiple_choice_num_options 4 --multiple_choice_eval_permutations cyclic \
        --n_context 30 --text_maxlength 512 --target_maxlength 16 --generation_max_length 16 --precision bf16 \
        --multiple_choice_train_permutations cyclic --retriever_n_context 30 \
        --train_retriever --query_side_retriever_training --gold_score_mode ppmean \
        --lr 5e-5 --lr_retriever 1e-5 --scheduler linear --dropout 0.1 --weight_decay 0.01 \
        --shard_optim --shard_grads --use_gradient_checkpoint_reader --use_gradient_checkpoint_retriever
    [ -z "${REMOVE_MODELS:-}" ] || rm -r "$OUT/$subject/checkpoint"
done
