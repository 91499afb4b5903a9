// SPDX-License-Identifier: GPL-2.0-only

//! What every run needs: devices, scenarios and their choice, a worker that is watched, a log of events.
//!
//! Scenarios run in a worker, another process of this program, so that one that hangs or crashes is a
//! result like others. Worker and watcher write events to the same [`Log`], one at a time: the watcher
//! writes while the worker waits for its next job, or is dead.

#![forbid(unsafe_code)]

mod amount;
mod cgroup;
mod context;
mod defects;
mod devices;
mod failure;
mod files;
mod fuse;
mod kept_file;
mod kmsg;
mod log;
mod machine;
mod other;
mod process;
mod progress;
mod recorder;
mod runner;
mod scenario;
mod search;
mod selection;
mod signals;
pub mod worker;

pub use amount::{Amount, new_seed};
pub use cgroup::Cgroup;
pub use context::Context;
pub use defects::{KnownDefects, Shows, Signature};
pub use devices::{Devices, Edus, new_uuid};
pub use failure::{Failure, Skip, Stuck};
pub use files::{HUGE_PAGE, HugePages, in_file};
pub use fuse::{
    FuseServer, ServeArguments, ServedElsewhere, needs_fuse, serve, unmount_fuse, unserved_memory,
};
pub use kmsg::Messages;
pub use log::Log;
pub use machine::{Setting, huge_pages_free, memory_available, pages_pinned, slab_unreclaimable};
pub use other::OtherProcess;
pub use process::{count_blocked, locked_memory, locked_memory_of, stacks};
pub use progress::Progress;
pub use recorder::{Output, Recorder, other_driver};
pub use runner::Suite;
pub use scenario::{Scenario, defect, scenario};
pub use search::{Engine, Job, Message};
pub use selection::{Selection, select};
pub use signals::stop_on_signals;
