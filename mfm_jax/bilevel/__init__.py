"""The bilevel step: the classifier's pass, the modulation, the meta-gradient, the training steps."""

from mfm_jax.bilevel.objective import Objective as Objective
from mfm_jax.bilevel.objective import halves as halves
from mfm_jax.bilevel.passes import Pass as Pass
from mfm_jax.bilevel.steps import MetaRule as MetaRule
from mfm_jax.bilevel.steps import PlainStep as PlainStep
from mfm_jax.bilevel.steps import Step as Step
from mfm_jax.bilevel.steps import init_state as init_state
from mfm_jax.bilevel.steps import make_plain_step as make_plain_step
from mfm_jax.bilevel.steps import make_retrain_step as make_retrain_step
from mfm_jax.bilevel.steps import make_step as make_step
