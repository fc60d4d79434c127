"""Many processes: all expert-parallel shards of a layer added up, and sweeps dealt to the ranks of torchrun.

shards.py   how E experts are cut into shards
part.py     one shard: inputs, candidate, its own verdict, and what the sum needs of it
sign.py     what a wrong shard does: missing, doubled, shifted, extra, scaled
total.py    the sum of all shards, judged against the layer with all experts
layer.py    one problem through all shards of this process
world.py    what torchrun says of this process
board.py    what ranks tell each other, in torchrun's store
child.py    the process of a rank that does the work
watch.py    hands it items, and starts another when it died or hangs
sweep.py    results of all ranks in order, on the one that reports
tasks.py    what is done with an item
"""
