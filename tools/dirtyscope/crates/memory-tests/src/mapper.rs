// SPDX-License-Identifier: GPL-2.0-only

//! Memory of another process than the one that has the devices: alive, dead, or executing another
//! program, with the files kept.

use anyhow::{Context as _, Result, ensure};
use dirty_model::Errno;
use harness::{
    Context, Failure, Scenario, locked_memory, locked_memory_of, pages_pinned, scenario,
};
use mdev_dma::{MdevDma, Opcode, Outcome, pattern};
use testbed::{
    PAGE, at,
    fixture::{Fixture, LONG, refused, succeeded},
    same, status,
};
use vfio_client::{Group, Mapper, UnmapArgs};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/mapper/alive",
        "pins and background commands reach the memory of the process that mapped it",
        alive,
    ),
    scenario(
        "type1/mapper/died",
        "with its process memory is gone: PIN is ENODEV, vfio_dma_rw() EPERM; pins stay good",
        died,
    ),
    scenario(
        "type1/mapper/died-closed",
        "what a dead process had mapped leaves nothing behind when everything is closed",
        died_closed,
    ),
    scenario(
        "type1/mapper/exec",
        "so it is when its process executes another program, in which nothing is locked",
        exec,
    ),
    scenario(
        "type1/mapper/exec-closed",
        "a program that has inherited the files holds pins until it closes them",
        exec_closed,
    ),
];

/// Pages that a child has mapped, and those of them that are pinned.
const PAGES: u64 = 16;
const PINNED: u64 = 4;
const SEED: u64 = 77;

/// A fixture whose container has memory of a child, tracked, with the first pages pinned and written;
/// and what was pinned before.
struct Scene {
    fixture: Fixture,
    mapper: Mapper,
    pinned: u64,
    locked: u64,
}

impl Scene {
    fn new(context: &Context<'_>) -> Result<Self> {
        let (pinned, locked) = (pages_pinned()?, locked_memory()?);
        let fixture = Fixture::without_mapping(context, 0, PAGES)?;
        // What this process has there is another page than the child's.
        fixture.memory.write(0, &[1; (PAGES * PAGE) as usize]);
        let devices = [fixture.device().device()];
        let mapper = Mapper::new(&fixture.container, &devices, &fixture.mapping(0..PAGES, 0))?;
        let this = Self { fixture, mapper, pinned, locked };
        same("VmLck of the child", 0, locked_memory_of(this.mapper.pid())?)?;
        this.fixture.pin(0..PINNED)?;
        this.locks(PINNED)?;
        this.fixture.container.dirty_start()?;
        succeeded("WRITE", this.device().write_pinned(at(0, 0), PINNED * PAGE, SEED)?)?;
        Ok(this)
    }

    fn device(&self) -> &MdevDma {
        self.fixture.device()
    }

    /// Fails unless so many pages are pinned, none of them counts here, and they are the child's.
    fn locks(&self, pages: u64) -> Result<()> {
        same("pages pinned", self.pinned + pages, pages_pinned()?)?;
        same("VmLck of the process that has the device", self.locked, locked_memory()?)?;
        let locked = locked_memory_of(self.mapper.pid())?;
        same("VmLck of the process that mapped", pages * PAGE, locked)
    }

    /// Runs a command in the background: as a kernel thread, which borrows the mapper's memory.
    fn in_background(&self, op: Opcode, page: u64, length: u64) -> Result<Outcome> {
        self.device().run_in_background(op, at(page, 0), length, SEED)?;
        let outcome = self.device().wait(LONG)?;
        ensure!(!outcome.is_in_progress(), "a command in the background doesn't end");
        Ok(outcome)
    }

    /// The pins that there are, and no more, as the memory of the child is gone.
    fn memory_is_gone(&self) -> Result<()> {
        let device = self.device();
        let last = at(PAGES - 1, 0);
        refused("PIN", Errno::ENODEV, device.pin(last, PAGE)?)?;
        refused("PIN of some that are pinned", Errno::ENODEV, device.pin(at(0, 0), 8 * PAGE)?)?;
        refused("DMA_READ", Errno::EPERM, device.dma_read(last, PAGE)?)?;
        refused("DMA_WRITE", Errno::EPERM, device.dma_write(at(0, 0), PAGE, SEED)?)?;
        for op in [Opcode::DmaRead, Opcode::DmaWrite] {
            let outcome = self.in_background(op, PAGES - 1, PAGE)?;
            refused("a command in the background", Errno::EPERM, outcome)?;
        }
        // Pages that are pinned are there, for who pins them once more, too.
        same("pages pinned", self.pinned + PINNED, pages_pinned()?)?;
        succeeded("PIN of a page that is pinned", device.pin(at(1, 0), PAGE)?)?;
        succeeded("UNPIN", device.unpin(at(1, 0), PAGE)?)?;
        self.reads_what_it_wrote(device.read_pinned(at(0, 0), PINNED * PAGE)?)?;
        self.fixture.reports(0..PAGES, &[0..PINNED])?;
        succeeded("UNPIN", device.unpin(at(0, 0), PAGE)?)?;
        self.fixture.reports(0..PAGES, &[0..PINNED])?;
        self.fixture.reports(0..PAGES, &[1..PINNED])?;
        same("pages pinned", self.pinned + PINNED - 1, pages_pinned()?)?;
        same("VmLck of the process that has the device", self.locked, locked_memory()?)?;
        self.own_memory_is_as_it_was()
    }

    fn reads_what_it_wrote(&self, read: Outcome) -> Result<()> {
        succeeded("a read", read)?;
        let mut expected = vec![0; (PINNED * PAGE) as usize];
        pattern::fill(&mut expected, SEED, at(0, 0));
        same("the digest of a read", pattern::digest(&expected, at(0, 0)), read.digest)
    }

    /// Nothing was written to what this process has at the same addresses.
    fn own_memory_is_as_it_was(&self) -> Result<()> {
        let all = [1; (PAGES * PAGE) as usize];
        let written = self.fixture.memory.first_difference(0, &all);
        Failure::unless_none(written.map(|at| {
            format!("memory of the process that hasn't mapped it is written, at byte {at:#x}")
        }))
    }

    fn unmap(&self) -> Result<()> {
        self.fixture.unmap(0..PAGES)?;
        same("PINS", 0, self.device().pins()?)?;
        same("pages pinned", self.pinned, pages_pinned()?)?;
        same("VmLck of the process that has the device", self.locked, locked_memory()?)?;
        same(
            "dma_avail",
            u16::MAX.into(),
            self.fixture.container.info()?.dma_avail.unwrap_or(0).into(),
        )
    }

    /// This process maps its own memory where the child's was.
    fn own_memory_takes_its_place(&self) -> Result<()> {
        self.fixture.map(0..PAGES)?;
        self.fixture.pin(3..5)?;
        same("VmLck", self.locked + 2 * PAGE, locked_memory()?)?;
        succeeded("DMA_WRITE", self.device().dma_write(at(9, 0), PAGE, SEED)?)?;
        ensure!(pattern::matches(&self.fixture.page(9), SEED, at(9, 0)), "page 9 isn't written");
        self.fixture.reports(0..PAGES, &[3..5, 9..10])?;
        self.fixture.unmap(0..PAGES)?;
        same("VmLck", self.locked, locked_memory()?)
    }
}

fn alive(context: &Context<'_>) -> Result<()> {
    let scene = Scene::new(context)?;
    let device = scene.device();
    // In the context of a process that isn't the mapper.
    refused("DMA_READ", Errno::EFAULT, device.dma_read(at(0, 0), PAGE)?)?;
    refused("DMA_WRITE", Errno::EFAULT, device.dma_write(at(8, 0), PAGE, SEED)?)?;
    scene.reads_what_it_wrote(scene.in_background(Opcode::DmaRead, 0, PINNED * PAGE)?)?;
    succeeded("DMA_WRITE", scene.in_background(Opcode::DmaWrite, 8, PAGE)?)?;
    scene.fixture.reports(0..PAGES, &[0..PINNED, 8..9])?;
    scene.fixture.reports(0..PAGES, &[0..PINNED])?;
    scene.own_memory_is_as_it_was()?;
    scene.locks(PINNED)?;
    succeeded("UNPIN", device.unpin(at(0, 0), PAGE)?)?;
    scene.locks(PINNED - 1)?;
    scene.unmap()?;
    scene.locks(0)?;
    scene.own_memory_takes_its_place()
}

fn died(context: &Context<'_>) -> Result<()> {
    let mut scene = Scene::new(context)?;
    scene.mapper.kill();
    scene.memory_is_gone()?;
    scene.unmap()?;
    scene.own_memory_takes_its_place()
}

fn died_closed(context: &Context<'_>) -> Result<()> {
    for closes_device_first in [false, true] {
        let mut scene = Scene::new(context)?;
        scene.mapper.kill();
        let pinned = scene.pinned;
        if closes_device_first {
            scene.fixture.close();
            same("pages pinned after the device was closed", pinned, pages_pinned()?)?;
            scene.fixture.reports(0..PAGES, &[0..PINNED])?;
            scene.fixture.reports(0..PAGES, &[])?;
            scene.fixture.open()?;
            refused("PIN", Errno::ENODEV, scene.device().pin(at(0, 0), PAGE)?)?;
        }
        drop(scene);
        same("pages pinned after everything was closed", pinned, pages_pinned()?)?;
    }
    Ok(())
}

fn exec(context: &Context<'_>) -> Result<()> {
    let mut scene = Scene::new(context)?;
    scene.mapper.become_shell()?;
    same("VmLck after exec", 0, locked_memory_of(scene.mapper.pid())?)?;
    scene.memory_is_gone()?;
    same("VmLck after exec and UNPIN", 0, locked_memory_of(scene.mapper.pid())?)?;
    let unmap = UnmapArgs { iova: at(0, 0), size: PAGE, ..Default::default() };
    let part = status(scene.fixture.container.unmap(&unmap))?;
    ensure!(part == Err(Errno::EINVAL), "UNMAP of a part: {part:?}");
    scene.unmap()?;
    same("VmLck after exec and UNMAP", 0, locked_memory_of(scene.mapper.pid())?)?;
    scene.own_memory_takes_its_place()
}

fn exec_closed(context: &Context<'_>) -> Result<()> {
    let node = context.device(0)?.node()?;
    for closes_by_itself in [true, false] {
        let Scene { fixture, mut mapper, pinned, .. } = Scene::new(context)?;
        mapper.become_shell()?;
        drop(fixture);
        let open = || status(Group::open(&node).map(drop));
        ensure!(open()? == Err(Errno::EBUSY), "the group is free, though another process has it");
        same("pages pinned after we have closed", pinned + PINNED, pages_pinned()?)?;
        let pid = mapper.pid();
        if closes_by_itself {
            same("VmLck after exec", 0, locked_memory_of(pid)?)?;
            mapper.run("exec 3>&- 4>&- 5>&-").context("close in the shell")?;
            same("VmLck after close", 0, locked_memory_of(pid)?)?;
        } else {
            mapper.kill();
        }
        same("pages pinned after it has closed", pinned, pages_pinned()?)?;
        let free = open()?;
        ensure!(free.is_ok(), "opening the group after it was closed: {free:?}");
    }
    Ok(())
}
