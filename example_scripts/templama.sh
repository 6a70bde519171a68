#!/bin/bash
#SBATCH --job-name=atlas-templama
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
# TempLAMA: do a model's answers change with its index? It is trained on the answers of 2017 with the Wikipedia of 2017,
# and evaluated on those of 2017 and 2020, with this index and with that of 2020.
#
# Needs: download_model.py models/atlas/xl, download_corpus.py corpora/wiki/enwiki-dec2017 and enwiki-dec2020,
# prepare_templama.py. Both corpora are embedded once, into $OUT/index_2017_$SIZE and $OUT/index_2020_$SIZE. The passage
# encoder is frozen, so both fit the model before and after training.
# Our choice: 30 updates on 32 examples and everything else as in nq_few_shot.sh.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
SIZE=${SIZE:-xl}
source example_scripts/launch.sh

NAME=${NAME:-templama_$SIZE}
batch_of 32
data=$DATA_DIR/data/templama_data
common=(--qa_prompt_format "{question}" --checkpoint_dir "$OUT" --reader_model_type "$READER"
    --retriever_model_path "$RETRIEVER" --n_context 40 --text_maxlength 384
    --eval_data "$data/temp_lama.test.2017.jsonl" "$data/temp_lama.test.2020.jsonl")

index_of "$OUT/index_2017_$SIZE" "$DATA_DIR/corpora/wiki/enwiki-dec2017"
run finetune_qa.py --name "$NAME" --model_path "$MODEL" "${INDEX_FLAGS[@]}" "${common[@]}" \
    --train_data "$data/temp_lama.train.2017.jsonl" --retriever_n_context 40 \
    --per_gpu_batch_size "$PER_GPU" --accumulation_steps "$STEPS" \
    --total_steps $((30 * STEPS)) --warmup_steps $((5 * STEPS)) --eval_freq $((15 * STEPS)) \
    --lr 4e-5 --lr_retriever 4e-5 --scheduler linear

index_of "$OUT/index_2020_$SIZE" "$DATA_DIR/corpora/wiki/enwiki-dec2020"
run evaluate.py --task qa --write_results --name "${NAME}_index_2020" --model_path "$OUT/$NAME" \
    "${INDEX_FLAGS[@]}" "${common[@]}" --target_maxlength 32 --generation_max_length 32 --precision bf16
