// SPDX-License-Identifier: GPL-2.0-only

//! That the check works: what is expected is falsified on purpose, and must be reported.

use anyhow::{Result, bail, ensure};
use events::Runs;
use harness::{Context, Failure, Scenario, scenario};
use testbed::{PAGE, Testbed, at, pages};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/selftest/lost-page",
        "a page expected dirty that was not written is reported as lost, and no other",
        lost_page,
    ),
    scenario(
        "type1/selftest/spurious-page",
        "a page expected clean that was written is reported as spurious, and no other",
        spurious_page,
    ),
    scenario("type1/selftest/memory", "a byte expected otherwise than it is is reported", memory),
];

/// A container in which pages 10 to 13 are dirty, the last two because they are pinned.
fn dirty_bed<'a>(context: &'a Context<'a>) -> Result<Testbed<'a>> {
    let mut bed = Testbed::with_pages(context, 100)?;
    bed.start()?;
    bed.dma_write(pages(10..12))?;
    bed.pin(12..14)?;
    Ok(bed)
}

fn lost_page(context: &Context<'_>) -> Result<()> {
    for page in [0, 9, 63, 64, 99] {
        let mut bed = dirty_bed(context)?;
        bed.falsify(at(page, 0));
        let found = difference(&bed.check())?;
        ensure!(found == (vec![(at(page, 0), at(page, PAGE))], vec![]), "reported as {found:x?}");
    }
    Ok(())
}

fn spurious_page(context: &Context<'_>) -> Result<()> {
    for page in [10, 11, 12, 13] {
        let mut bed = dirty_bed(context)?;
        bed.falsify(at(page, 0));
        let found = difference(&bed.check())?;
        ensure!(found == (vec![], vec![(at(page, 0), at(page, PAGE))]), "reported as {found:x?}");
    }
    Ok(())
}

fn memory(context: &Context<'_>) -> Result<()> {
    let mut bed = dirty_bed(context)?;
    bed.check()?;
    bed.falsify_memory(at(11, 77));
    let Err(error) = bed.check() else { bail!("not noticed") };
    let expected = format!("byte at {:#x} ", at(11, 77));
    ensure!(error.to_string().contains(&expected), "reported as: {error}");
    Ok(())
}

/// What a check reported as lost and as spurious.
fn difference(checked: &Result<()>) -> Result<(Runs, Runs)> {
    let Err(error) = checked else { bail!("not noticed") };
    let Some(failure) = error.downcast_ref::<Failure>() else { bail!("another error: {error:#}") };
    Ok((failure.0.lost.clone(), failure.0.spurious.clone()))
}
