"""The record of a compression run, as data, as a page, as a model card and as a table.

A report is a plain dict that JSON can hold. Every key is optional, and so is every section of the
page; ``check_report`` refuses keys that are not listed here.

REPORT
    name            what to call the compressed model
    source          {path, family, id, license}: ``id`` if it is a hub repository
    output          {path, dtype}
    command         the command line, one string
    environment     what ``environment()`` returns
    seed            int
    config          the run's configuration, any nesting
    data            {calibration, evaluation}: file name -> sha256 (hex)
    seconds         step -> wall seconds, in the order of the steps
    peak_memory_mib float, what ``peak_memory_mib()`` returns at the end
    before, after   MODEL: the original and the compressed model
    stages          list of STAGE in the order in which they were applied, counted from 0
    routing_by_domain   list of {layer, frequency: domain -> [E], removed, novices, merged}, of the
                    original
    loader          {trust_remote_code: bool, notes: list of sentences}: what a loader needs
    warnings        list of sentences

MODEL
    parameters      {total, active, experts}
    bytes           of all weights as stored
    evaluation      EVALUATION

EVALUATION (``Evaluation.to_dict()``)
    domains         name -> DOMAIN: {tokens, bytes, nll, perplexity, bits_per_byte, kl,
                    top1_agreement}
    total, mean     DOMAIN of all text, and the mean over domains
    tokens_per_second, seq_len, batch_size

STAGE (a cut, a training, or a cut and then a training)
    method          str: how it was cut; "distill" if it was only trained
    settings        dict, of the cut
    kept            str: one sentence or number, such as "48 of 64 experts per layer, 4 of 8
                    key/value groups per layer"
    layers          list of LAYER, those with experts only; empty if nothing was cut
    dropped_layers  indices of whole layers that went, which ``layers`` does not list
    parameters      as in MODEL, after the cut
    confidence      CONFIDENCE, if the cut was measured
    training        TRAINING, if it was trained
    evaluation      {cut, trained}: EVALUATION of the model right after the cut and after the
                    training, against the original. That of the last step of the last stage may
                    be absent: it is the report's ``after``.

CONFIDENCE (see ``moe_jax.confidence``)
    verdict         one sentence: whether the text was enough, or why that cannot be said
    coverage        {floor, tokens, experts, num_few, few, edges, histogram, busiest, uniform}:
                    of ``few`` the first hundred
    convergence     {shares, layers, kept, common, rank_correlation}: the last two
                    [shares][layers]; absent where the ranking is not one of experts by text
    unsure          {probability, resamples, degrees, number, experts}: those that other text would
                    have decided otherwise with at least this probability, the likeliest twenty as
                    [layer, expert, whether it was kept, probability]

TRAINING
    settings        dict: those that differ from their defaults, and ``loss``, ``learning_rate``
    steps, tokens   int, of this training
    tokens_per_second   the median, or None
    metrics         list of {step, loss, distill, lm, hidden, router, balance, learning_rate}: what
                    was logged, ``step`` and what else there is; the parts of the loss unweighted

LAYER (before the stage; lists over all E experts, ids index them)
    layer           index in the model
    num_experts     E
    count           [E] tokens routed to each expert by calibration
    routing_mass    [E] sum of routing weights
    variance        [E] trace of the covariance of the output
    score           [E] what the ranking used
    removed         ids of experts that are gone and left nothing
    novices         ids of experts that are now a constant vector
    merged          groups of ids of experts that became one, which stands in the place of the first
    expert_width    [before, after], hidden neurons as stored: padding counts
    widths          [E] neurons that each expert keeps, where they differ; 0 for those that are gone
    kv_groups       [before, after], key/value heads with their query heads
    unreached       ids of experts that calibration never reached
    fewer_tokens_than_neurons   ids of experts that calibration reached by fewer tokens than they
                    have neurons, if the cut looked at second moments
    importance      what ``importance_curve()`` returns
"""

from moe_jax.report.card import model_card
from moe_jax.report.environment import environment, peak_memory_mib
from moe_jax.report.figures import (
    importance_curve,
    plot_bits_per_byte,
    plot_experts,
    plot_kl,
    plot_neuron_importance,
    plot_routing_by_domain,
    plot_scores,
    plot_stages,
    plot_training,
)
from moe_jax.report.files import check_report, plain, read_report, write_report
from moe_jax.report.page import report_html
from moe_jax.report.stages import stage_points
from moe_jax.report.summary import summary_table

__all__ = [
    "check_report",
    "environment",
    "importance_curve",
    "model_card",
    "peak_memory_mib",
    "plain",
    "plot_bits_per_byte",
    "plot_experts",
    "plot_kl",
    "plot_neuron_importance",
    "plot_routing_by_domain",
    "plot_scores",
    "plot_stages",
    "plot_training",
    "read_report",
    "report_html",
    "stage_points",
    "summary_table",
    "write_report",
]
