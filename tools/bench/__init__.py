"""One run of everything that trains the last N layers of a model: EdgeTune's engines and codecs, and their rivals.

    python -m tools.bench --preset quick                        two models, last 4, batch 64, all contenders
    python -m tools.bench --model resnet18 --last 4 --batch 64 --contender pytorch --contender torch/hosvd
    python -m tools.bench --growth                              seconds and bytes over batch, resolution, N and ε

Figures go to one JSON file, to which the next run adds; the page and the plots are made from it.
"""
