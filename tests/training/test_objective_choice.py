"""Which loss trains a pair: every objective trains through `fit`, reports the plain bound, and resumes bit for bit."""

import pytest
import torch

from inference import ConfigError, fit, load_run, log_evidence
from inference.training import objective_choice
from inference.training.config import TrainConfig
from inference.training.objective_choice import DiffusionBound, loss_buffers, make_loss, make_report, objective_of
from ppl_models import DDPM, HVAE, VAE, CategoricalVAE, LinearGaussian
from ppl_models.likelihoods import Bernoulli, Normal
from tests.cases import CASES


def _vae() -> VAE:
    return VAE.preset((3,), Normal(scale=0.5), latent_dim=2, hidden=(4,))


def _ddpm() -> DDPM:
    return DDPM.preset((3,), Normal(), num_timesteps=4, hidden=8, blocks=1, predict="x_0")


def _categorical() -> CategoricalVAE:
    return CategoricalVAE.preset((3,), Bernoulli(), num_latents=2, num_classes=3, hidden=(4,))


def _plain_ddpm() -> DDPM:
    return DDPM.preset((3,), Normal(), num_timesteps=4, hidden=8, blocks=1, predict="x_0", variance="beta")


OBJECTIVES = [
    (_vae, "elbo", {}),
    (_vae, "iwae", {"num_particles": 3}),
    (_vae, "dreg", {"num_particles": 3}),
    (_categorical, "enumeration", {}),
    (_categorical, "score_function", {"num_particles": 3}),
    (_categorical, "gumbel_softmax", {"temperature": 2.0, "temperature_end": 0.5}),
    (_categorical, "straight_through", {}),
    (_ddpm, "vlb", {}),
    (_plain_ddpm, "simple", {"timesteps": "uniform"}),
    (_ddpm, "hybrid", {"auxiliary_weight": 0.1, "timesteps": "loss_second_moment"}),
]


@pytest.mark.parametrize(("build", "name", "options"), OBJECTIVES, ids=[name for _, name, _ in OBJECTIVES])
def test_each_objective_trains_and_a_cut_run_ends_the_same(tmp_path, monkeypatch, build, name, options):
    x = (torch.rand(40, 3) < 0.5).to(torch.get_default_dtype())
    options = {"objective": name, "epochs": 3, "batch_size": 16, "progress": False, **options}

    def trained(folder, cut):
        torch.manual_seed(0)
        pair = build()
        if cut:
            from inference.training.trainer import Trainer

            end = Trainer._end_epoch

            def stop(self, timing):
                end(self, timing)
                if self.epoch == 1:
                    self.save()
                    raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(Trainer, "_end_epoch", stop)
                with pytest.raises(KeyboardInterrupt):
                    fit(pair, x, folder, **options)
            torch.manual_seed(0)
            return fit(build(), x, folder, resume=True, **options)
        return fit(pair, x, folder, **options)

    whole, resumed = trained(tmp_path / "whole", False), trained(tmp_path / "cut", True)
    assert whole.metrics == resumed.metrics
    assert all(torch.equal(a, b) for a, b in zip(whole.pair.parameters(), resumed.pair.parameters(), strict=True))
    assert load_run(tmp_path / "whole").config["train"]["objective"] == name


def test_auto_is_the_pairs_own():
    for pair, name in ((_vae(), "elbo"), (_ddpm(), "vlb"), (_categorical(), "straight_through")):
        assert objective_of(pair, TrainConfig()) == name


@pytest.mark.parametrize("name", CASES)
def test_every_registered_pair_trains_under_auto_and_reports_its_bound(name):
    pair = CASES[name].build()
    x = CASES[name].data(pair)
    loss = make_loss(pair, TrainConfig(), 10)
    objective, terms = loss.step(x)
    assert set(loss.latents) <= set(terms)
    assert objective is None or objective.shape == (len(x),)
    with torch.no_grad():
        bound = make_report(pair.eval(), loss).terms(x)
    assert all(torch.isfinite(term).all() and term.shape == (len(x),) for term in bound.values())


def test_what_is_reported_does_not_depend_on_the_objective():
    """With the posterior as guide each draw gives the evidence, whatever trains; the twin's bound is another number."""
    pair = LinearGaussian.random(4, 2)
    x = pair.model(size=6).detach()
    for name, k in (("elbo", 1), ("iwae", 5), ("dreg", 5)):
        loss = make_loss(pair, TrainConfig(objective=name, num_particles=k), 1)
        loss.step(x)
        report = make_report(pair, loss)
        drawn = sum(report.terms(x).values())
        assert (drawn - pair.log_evidence(x)).abs().max() < 8 * 2**0.5 * 3  # one draw of closed-form terms
    gapped = LinearGaussian.random(4, 2, guide="mean_field")
    loss = make_loss(gapped, TrainConfig(objective="iwae", num_particles=500), 1)
    objective, terms = loss.step(x)
    assert (-objective > sum(terms.values())).all(), "IWAE is above the ELBO of the same draws"
    assert objective.shape == (6,)


def test_iwae_step_is_the_bound_of_the_same_draws():
    pair = LinearGaussian.random(4, 2, guide="mean_field")
    x = pair.model(size=6).detach()
    loss = make_loss(pair, TrainConfig(objective="iwae", num_particles=5000), 1)
    objective, _ = loss.step(x)
    e = log_evidence(pair.model, pair.guide, x, num_particles=5000)
    assert ((-objective - e.log_evidence).abs() < 7 * 2**0.5 * e.std_error + 1e-3).all()


def test_a_diffusions_report_is_unbiased():
    """Means over draws of t: as many as T cover each t once, so the average over calls is the sum of all L_t."""
    pair = CASES["linear-diffusion-exact"].build()
    x = CASES["linear-diffusion-exact"].data(pair)
    report = DiffusionBound(pair)
    with torch.no_grad():
        draws = torch.stack([sum(report.terms(x).values()) for _ in range(400)])
    error = draws.std(0) / 400**0.5
    assert ((draws.mean(0) - pair.elbo(x)).abs() < 6.5 * error + 1e-9).all()
    assert ((draws.mean(0) - 1.5 * pair.elbo(x)).abs() > 6.5 * error).any(), "the twin: a bound that is half too large"


def test_the_temperature_falls_over_the_run():
    loss = make_loss(_categorical(), TrainConfig(objective="gumbel_softmax", temperature=2.0, temperature_end=0.5), 100)
    seen = []
    for step in (0, 50, 100):
        loss.anneal(step)
        seen.append(float(loss.temperature))
    assert seen == pytest.approx([2.0, 1.0, 0.5])
    assert set(loss_buffers(loss)) == {"temperature"}


@pytest.mark.parametrize(
    ("build", "options", "match"),
    [
        (_vae, {"objective": "vlb"}, r"objective: expected elbo, iwae.* for VAE, got 'vlb'"),
        (_ddpm, {"objective": "elbo"}, r"objective: expected vlb, simple, hybrid for DDPM, got 'elbo'"),
        (_ddpm, {"free_bits": 1.0}, r"free_bits: expected 0 with objective 'vlb'"),
        (_ddpm, {"kl_warmup_epochs": 2}, r"kl_warmup_epochs: expected 0 with objective 'vlb'"),
        (_vae, {"objective": "iwae", "free_bits": 1.0}, r"free_bits: expected 0 with objective 'iwae'"),
        (_ddpm, {"num_particles": 4}, r"num_particles: expected 1 for a diffusion, got 4"),
        (_ddpm, {"objective": "hybrid"}, r"auxiliary_weight: expected with objective hybrid and only there, got None"),
        (_vae, {"auxiliary_weight": 1.0}, r"auxiliary_weight: expected with objective hybrid"),
        (_ddpm, {"timesteps": "loss_second_moment", "processes": 2}, r"timesteps: expected stratified or uniform"),
        (_categorical, {"objective": "enumeration", "num_particles": 2}, r"num_particles=1 with enumeration"),
        (
            lambda: CategoricalVAE.preset((3,), Bernoulli(), num_latents=400, num_classes=10, hidden=(4,)),
            {"objective": "enumeration"},
            r"objective: expected at most 65536 values to sum over, got K\^M = 10\^400 = 1.00e\+400",
        ),
        (
            lambda: HVAE.preset((3,), Normal(), (2, 2), hidden=(4,)),
            {"kl_warmup_epochs": (1.0, 2.0, 3.0)},
            r"kl_warmup_epochs: expected one number, or one for each latent site \(z_2, z_1\), got 3",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(tmp_path, build, options, match):
    x = torch.ones(8, 3)
    with pytest.raises(ConfigError, match=match):
        fit(build(), x, tmp_path / "run", progress=False, **options)
    assert not (tmp_path / "run").exists()


def test_warm_up_by_layer_weights_each_rate():
    pair = HVAE.preset((3,), Normal(), (2, 2), hidden=(4,))
    run = fit(pair, torch.randn(32, 3), epochs=3, batch_size=32, kl_warmup_epochs=(2.0, 0.0), progress=False)
    assert [row["rate_weight"] for row in run.metrics] == [0.0, 0.5, 1.0]


def test_what_is_reported_of_many_numbers_a_row_is_drawn_in_parts(monkeypatch):
    torch.manual_seed(0)
    pair, x, seen = _ddpm(), torch.randn(10, 3), []
    bound = DiffusionBound(pair)
    pair.network.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    means = {}
    for limit in (2**23, 36):  # 6 numbers a row: 6 rows
        monkeypatch.setattr(objective_choice, "NUMBERS_AT_ONCE", limit)
        seen.clear()
        with torch.no_grad():
            draws = [torch.stack(list(bound.terms(x).values())).sum(0) for _ in range(200)]
        assert max(seen) == (40 if limit > 36 else 6)
        each = torch.stack(draws).mean(-1)
        means[limit] = float(each.mean()), float(each.std()) / 200**0.5
    (a, s), (b, r) = means.values()
    assert abs(a - b) < 6 * (s**2 + r**2) ** 0.5
