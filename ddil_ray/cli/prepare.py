"""`ddil-ray prepare`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ddil_ray.cli.options import AsJson, Config, Overrides, Verbose, print_json, print_lines, print_table

__all__ = ["prepare"]


def prepare(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing.")
    ] = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Encode images and captions for a teacher of latents: to latents, prompts and their embeddings as Parquet.

    CONFIG names `teacher.model`, `data.source` and `output`. The same command again does what is missing only.

    Examples:

    `ddil-ray prepare prepare.yaml --dry-run`

    `ddil-ray prepare prepare.yaml buckets=aspect resolution=1024 encode_images.num_actors=8`

    `ddil-ray prepare prepare.yaml data.source=s3://bucket/tars output=s3://bucket/prepared`
    """
    from ddil_ray.config import load_config
    from ddil_ray.config.prepare import PrepareConfig
    from ddil_ray.prepare import new_job

    job = new_job(load_config(config, overrides or [], kind=PrepareConfig))
    if dry_run:
        _print_plan(_plan_of(job), as_json=as_json)
        return

    from ddil_ray.runtime.prepare import prepare as prepare_on_ray
    from ddil_ray.tracking import View

    with View() as view:
        done = prepare_on_ray(job, view=view, verbose=verbose)
    if as_json:
        print_json(done._asdict())
        return
    speed = f", {done.images_per_s:.1f}/s" if done.images_per_s else ""
    print_lines(
        *(f"images   {rows} of {bucket}" for bucket, rows in done.buckets.items()),
        f"prompts  {done.prompts}",
        f"skipped  {done.skipped}" + (f" (see {done.output}/skipped.jsonl)" if done.skipped else ""),
        f"data     {done.output}" + speed,
        f"next     data.source={done.output} in the config of `ddil-ray distill`",
    )


def _plan_of(job: Any) -> dict[str, Any]:
    roles = {"encode_prompts": job.prompted, "encode_images": job.reader.images}
    config = job.config
    return {
        "output": job.store.url,
        "teacher": {"model": config.teacher.model, "family": job.family},
        "source": {
            "path": job.reader.source,
            "format": job.reader.format,
            "condition": job.reader.key,
            "images": job.reader.images,
            "shards": len(job.shards),
            "bytes": sum(shard.size for shard in job.shards),
        },
        "buckets": {bucket.name: list(job.latent_shape(bucket)) for bucket in job.buckets} if job.reader.images else {},
        "dtype": config.dtype,
        "actors": [
            {
                "role": name,
                "count": getattr(config, name).bounds[0],
                "num_cpus": getattr(config, name).num_cpus,
                "num_gpus": getattr(config, name).num_gpus,
            }
            for name, used in roles.items()
            if used
        ],
    }


def _print_plan(plan: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(plan)
        return
    source = plan["source"]
    print_lines(
        f"output    {plan['output']}",
        f"teacher   {plan['teacher']['model']} ({plan['teacher']['family']})",
        f"data      {source['path']}: {source['format']}, {source['shards']} files or folders of "
        f"{source['bytes'] / 2**20:.1f} MiB, conditions from {source['condition']!r}",
        *(f"bucket    {name}, latents of shape {tuple(shape)}" for name, shape in plan["buckets"].items()),
    )
    print_table(
        "Actors at least",
        ["role", "actors", "CPUs each", "GPUs each"],
        [[a["role"], str(a["count"]), f"{a['num_cpus']:g}", str(a["num_gpus"])] for a in plan["actors"]],
    )
    print_lines("Nothing was started.")
