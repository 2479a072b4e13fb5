"""The methods of `fastpost train` and its first screen of help, which have to be there before torch is imported."""

METHODS = (
    *("none", "sam", "sam_lm", "asam", "r3f", "r4f"),
    *("sam+r3f", "sam+r4f", "tram", "anchor", "sam+anchor"),
    *("r3f+anchor", "sam+r3f+anchor", "gap"),
)

HELP = """usage: fastpost train [run.yaml] --method METHOD --train_file FILE [options]

Trains one model by one method on one data set. Writes the model, metrics.csv,
report.png and report.html to --output_dir.

examples:
  # a classifier with SAM, from a table with the columns text and label
  fastpost train --method sam --train_file reviews.csv --num_train_epochs 3
  # a causal language model with R3F, from plain text
  fastpost train --method r3f --model ./gpt2 --train_file book.txt
  # GAP: gradient ascent on one text; held.txt chooses the step and reports
  fastpost train --method gap --model ./gpt2 --train_file texts.jsonl \\
      --text_index 2 --validation_file held.txt
  # the same run again, with another seed
  fastpost train fastpost-runs/train/run.yaml --seed 1 --output_dir again

what to train, and on what:
  --method METHOD        {methods[0]},
                         {methods[1]},
                         {methods[2]}
  --model MODEL          folder or hub name; without it a small encoder
  --train_file FILE      .txt, .jsonl, .csv or .tsv (or --dataset NAME)
  --validation_file FILE default: a tenth of the training data is held out
  --label_column NAME    default: label. With labels the model classifies
  --output_dir DIR       default: fastpost-runs/train
training:
  --learning_rate, --num_train_epochs, --max_steps, --seed, --bf16,
  --per_device_train_batch_size, --gradient_accumulation_steps
methods:
  SAM     --sam_rho 0.05    radius of the perturbation; --sam_scope the weights
          --sam_variant V   gsam:alpha=0.2, looksam and others
  R3F     --r3f_lambda 1.0  weight of the divergence; --r3f_eps 1e-5 the noise
          --r3f_relative V  rdrop:alpha=1, neftune and others
  anchor  --anchor_kl 0.1   weight of the divergence; --anchor reference or ema
  GAP     --gap_steps 15    steps uphill at most; --gap_lr 5e-5

--help-all lists every option, those of transformers' TrainingArguments too.
A YAML or JSON file may hold options under the same names; typed ones win.
""".format(methods=[", ".join(names) for names in (METHODS[:6], METHODS[6:11], METHODS[11:])])
