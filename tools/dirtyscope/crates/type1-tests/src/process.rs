// SPDX-License-Identifier: GPL-2.0-only

//! What the process that owns the memory does meanwhile, and what it may not.

use anyhow::{Context as _, Result};
use dirty_model::Errno;
use harness::{Context, Scenario, locked_memory, scenario};
use mdev_dma::Opcode;
use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities},
};
use testbed::{Op, PAGE, Testbed, at, command, pages};
use vfio_client::Fork;

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/process/hidden-memory",
        "devices fault on memory that was taken away, nothing is dirty; pins stay good",
        hidden_memory,
    ),
    scenario(
        "type1/process/memlock-limit",
        "over RLIMIT_MEMLOCK, without CAP_IPC_LOCK, PIN is ENOMEM and leaves nothing pinned",
        memlock_limit,
    ),
    scenario(
        "type1/process/fork",
        "after fork() devices go on writing to the parent's memory, and it is dirty",
        fork,
    ),
];

fn hidden_memory(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 64)?;
    bed.user_write(pages(0..64))?;
    bed.pin(12..13)?;
    bed.start()?;
    bed.must(Op::Hide { iova: at(10, 0), size: 4 * PAGE })?;
    bed.refused(Errno::EFAULT, command(0, Opcode::DmaWrite, at(10, 0)..at(10, 1)))?;
    bed.refused(Errno::EFAULT, command(0, Opcode::DmaRead, at(9, 0)..at(11, 0)))?;
    bed.refused(Errno::EFAULT, command(0, Opcode::Pin, pages(10..12)))?;
    bed.reports(&[12..13])?;

    bed.pin(12..13)?;
    bed.transfer(Opcode::Write, pages(12..13))?;
    bed.dma_write(at(9, 5)..at(10, 0))?;
    bed.must(Op::Show { iova: at(10, 0), size: 4 * PAGE })?;
    bed.check_memory()?;
    bed.dma_write(at(10, 0)..at(12, 0))?;
    bed.pin(13..14)?;
    bed.reports(&[9..14])?;
    bed.reports(&[12..14])?;
    bed.check()
}

/// The rights of this thread and the limit of this process, restored when dropped.
pub(crate) struct Rights(CapabilitySets, Rlimit);

impl Rights {
    /// Takes away CAP_IPC_LOCK and lets the process lock so many bytes.
    pub(crate) fn limit(bytes: u64) -> Result<Self> {
        let old = Self(capabilities(None)?, getrlimit(Resource::Memlock));
        let effective = old.0.effective - CapabilitySet::IPC_LOCK;
        set_capabilities(None, CapabilitySets { effective, ..old.0 }).context("capset")?;
        setrlimit(Resource::Memlock, Rlimit { current: Some(bytes), ..old.1 })
            .context("setrlimit")?;
        Ok(old)
    }
}

impl Drop for Rights {
    fn drop(&mut self) {
        let given_back = setrlimit(Resource::Memlock, self.1).and(set_capabilities(None, self.0));
        debug_assert!(given_back.is_ok());
    }
}

fn memlock_limit(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 64)?;
    bed.add_device()?;
    bed.count_locked_memory()?;
    {
        let _rights = Rights::limit(locked_memory()? + 10 * PAGE)?;
        bed.limit_locked_pages(Some(10));
        bed.map(64..128)?;
        bed.pin(64..72)?;
        bed.refused(Errno::ENOMEM, command(0, Opcode::Pin, pages(72..75)))?;
        bed.check()?;
        // What is pinned counts once.
        bed.must(command(1, Opcode::Pin, pages(66..74)))?;
        bed.refused(Errno::ENOMEM, command(1, Opcode::Pin, pages(74..75)))?;
        bed.unpin(64..65)?;
        bed.pin(74..75)?;
        bed.check()?;
        // Who mapped this could lock what they wanted.
        bed.pin(0..20)?;
        bed.check()?;
    }
    bed.limit_locked_pages(None);
    bed.must(Op::unmap_all())?;
    bed.check()
}

fn fork(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 32)?;
    bed.user_write(pages(0..32))?;
    bed.pin(2..6)?;
    bed.start()?;
    let child = Fork::new()?;
    bed.transfer(Opcode::Write, at(2, 7)..at(6, 0))?;
    bed.user_write(pages(7..8))?;
    bed.dma_write(at(7, 9)..at(9, 9))?;
    bed.pin(12..14)?;
    bed.transfer(Opcode::Write, pages(12..14))?;
    bed.user_write(pages(13..15))?;
    bed.transfer(Opcode::DmaRead, pages(0..32))?;
    bed.transfer(Opcode::Read, pages(12..14))?;
    bed.reports(&[2..6, 7..10, 12..14])?;
    bed.check()?;
    drop(child);
    bed.transfer(Opcode::Write, pages(2..6))?;
    bed.dma_write(pages(20..21))?;
    bed.unpin(2..6)?;
    bed.reports(&[2..6, 12..14, 20..21])?;
    bed.check()
}
