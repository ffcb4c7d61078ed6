"""Read the report.

`kart analyse RUN` writes one self-contained page, and its numbers beside it as JSON and CSV. It
holds the sections that the runs allow, those below in this order, and says in one line why another
is missing. `kart study report` writes a page of its own, and its trials as CSV.

# The numbers

A cell is the mean over n seeds with its 95 % interval. Intervals of accuracies are made on the
scale of the logit and stay between 0 and 100 %. Three seeds make wide intervals: that is what three
seeds know. One seed has none.

>>> from kart import statistics
>>> statistics.accuracy([0.962, 0.958, 0.966]).text()
'96.20 [95.07, 97.08]'
>>> statistics.accuracy([0.962]).text()
'96.20 (one seed)'

A difference to the baseline is paired by seed, since a seed fixes the batches and the first weights
of both. Quote this number: its interval can leave out zero although the intervals of the two
overlap.

>>> statistics.difference([0.972, 0.967, 0.977], [0.962, 0.958, 0.966]).text(sign="+")
'+1.00 [+0.75, +1.25]'

# The curves

Training and validation by epoch. The page says of a run that still rises at the end that it has not
converged: two such runs compare how fast they learn, not how well.

# The functions

What each unit learned, over the scores that occurred: the silhouette along the bottom shows how
many there were. Where no score fell the curve is the basis's own extrapolation and means nothing.

# The maps

The class token's attention over an image, one panel a head, each scaled to its own largest weight:
colour is dense where the weight is large, and panels are not to be compared in strength. Negative
weights, which KArAt may have, are dropped there as in the paper. A map is what the operator weighs,
not by itself what the decision rests on: the pointing game, on images whose object is known
(`--data masked_digits`), puts a number to it.

# How tokens are mixed

The points of accuracy that are lost when every learned function is replaced by the constant, the
affine function or the exponential nearest to it. Read the upper end of the interval: the shape of
the function matters no more than that. That an interval holds zero may only say that seeds are few.
The first column replaces the whole attention matrix by its mean over images. Below stand what is
left of the loss after some more steps of training, the share of the output that position explains,
and the mean matrix as a picture.

# Spectra, weights, landscape, curvature, cost

How many directions a head's weights use; how weights are distributed, over training where the run
kept a trajectory (`--trajectory 60`); how the loss rises around the final weights, along the path
of that trajectory and in a random plane; eigenvalues and trace of the Hessian; and what an operator
costs beside softmax. Each says on the page what it measures.

# A study's page

The table of winners has three columns of accuracy: on the test split and on validation images with
fresh seeds, and on validation images of the search, which chose by it (hence too good). The
parameters that mattered are ranked by how far their values in the better trials
differ from those in all of them (PED-ANOVA); it says nothing beyond the space that was searched.
"""
