#!/bin/bash
#SBATCH --job-name=atlas-pretrain-mlm
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
# Pretraining with masked spans: reader and retriever learn together from the passages of a corpus, from T5 and
# Contriever (MODEL=none). HELD_OUT is a jsonl file of passages to evaluate on, CORPUS another directory of passages.
#
# Needs: download_corpus.py corpora/wiki/enwiki-dec2021.
# After the paper (section on pretraining): 10,000 updates on 64 passages, learning rates 1e-4 and 1e-5 with 1,000
# updates of warm-up and linear decay, the index is refreshed every 1,000 updates, 20 passages, perplexity
# distillation.
# Our choice: 384 tokens, targets of 128, passages of 20 words or more, and more refreshes at the start, where the
# retriever changes fast. The paper also uses Common Crawl passages, which were not released.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
SIZE=${SIZE:-base}
MODEL=${MODEL:-none}
source example_scripts/launch.sh

CORPUS=${CORPUS:-$DATA_DIR/corpora/wiki/enwiki-dec2021}
batch_of 64

run train.py --task mlm --name "${NAME:-pretrain_mlm_$SIZE}" \
    --checkpoint_dir "$OUT" --model_path "$MODEL" --reader_model_type "$READER" --retriever_model_path "$RETRIEVER" \
    --train_data "$CORPUS/text-list-100-sec.jsonl" --shuffle --min_words_per_lm_instance 20 \
    --passages "$CORPUS/text-list-100-sec.jsonl" "$CORPUS/infobox.jsonl" \
    ${HELD_OUT:+--eval_data "$HELD_OUT"} \
    --train_retriever --gold_score_mode pdist --temperature_gold 0.01 --temperature_score 0.01 \
    --refresh_index "0-$((1000 * STEPS)):$((250 * STEPS)),$((1000 * STEPS))-$((10000 * STEPS)):$((1000 * STEPS))" \
    --n_context 20 --retriever_n_context 20 --text_maxlength 384 --target_maxlength 128 \
    --per_gpu_batch_size "$PER_GPU" --accumulation_steps "$STEPS" \
    --total_steps $((10000 * STEPS)) --warmup_steps $((1000 * STEPS)) --scheduler linear --lr 1e-4 --lr_retriever 1e-5 \
    --eval_freq $((1000 * STEPS)) --save_freq $((500 * STEPS)) --log_freq $((10 * STEPS)) --keep_checkpoints 2 \
    --precision bf16 --shard_optim --shard_grads \
    --use_gradient_checkpoint_reader --use_gradient_checkpoint_retriever
