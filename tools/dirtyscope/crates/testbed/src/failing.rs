// SPDX-License-Identifier: GPL-2.0-only

//! Operations of which an allocation fails.

use crate::{Answer, Op, Testbed};
use anyhow::Result;
use dirty_model::Errno;
use harness::Failure;
use vfio_client::fail_nth::with_failure;

/// What came of an operation of which an allocation was to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injected {
    /// It had fewer.
    Unused,
    /// One failed, and the operation did what it must nevertheless.
    Absorbed,
    /// The operation failed for it, and must have changed nothing.
    Failed,
}

impl Testbed<'_> {
    /// Does `op`, whose `n`th allocation fails in the kernel, counted from 1. If that is why it fails,
    /// the model doesn't do it; else as [`Self::apply`].
    pub fn apply_with_failure(&mut self, op: &Op, n: u32) -> Result<Injected> {
        let number = self.begin(op);
        let (answer, used) = match op {
            Op::Command { .. } => self.kernel.command_with_failure(op, n)?,
            _ => {
                let (answer, used) = with_failure(n, || self.in_kernel(op))?;
                let refused =
                    |error| errno_of(&error).map(|errno| Answer::of(Err(errno))).ok_or(error);
                (answer.or_else(refused)?, used)
            }
        };
        match answer.status {
            Err(Errno::ENOMEM | Errno::EFAULT) if used => {
                let reply = answer.to_reply(op);
                let event = events::Answer { n: number, model: reply.clone(), kernel: reply };
                self.context.answer(|| event);
                Ok(Injected::Failed)
            }
            Err(errno) if used => {
                let what =
                    format!("{op}: {errno}, which says nothing of an allocation that failed");
                Err(Failure::new(what).into())
            }
            _ => {
                self.conclude(number, op, &answer)?;
                Ok(if used { Injected::Absorbed } else { Injected::Unused })
            }
        }
    }
}

/// The errno of a call, if it is a call that has failed.
pub fn errno_of(error: &anyhow::Error) -> Option<Errno> {
    let of_vfio = error.downcast_ref::<vfio_client::Error>().map(vfio_client::Error::errno);
    let errno = of_vfio.or_else(|| error.downcast_ref::<mdev_dma::Error>().map(|e| e.errno()))?;
    (errno != 0).then_some(Errno(errno))
}
