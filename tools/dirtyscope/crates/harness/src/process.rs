// SPDX-License-Identifier: GPL-2.0-only

//! What `/proc` says of processes.

use crate::kept_file::KeptFile;
use anyhow::{Context as _, Result};
use procfs::process::{Process, Task};
use std::{fmt::Write as _, fs};

/// Bytes that count against this process's RLIMIT_MEMLOCK: type1 counts there, privileged or not.
pub fn locked_memory() -> Result<u64> {
    // The fuzzer asks often.
    static STATUS: KeptFile = KeptFile::new("/proc/self/status");
    Ok(1024 * STATUS.find(locked_kib)?)
}

/// The same of another process.
pub fn locked_memory_of(pid: u32) -> Result<u64> {
    let file = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&file).with_context(|| file.clone())?;
    Ok(1024 * locked_kib(&status).with_context(|| format!("no VmLck in {file}"))?)
}

/// One line of many: procfs takes its time to parse them all.
fn locked_kib(status: &str) -> Option<u64> {
    let mut lines = status.lines();
    let kib = lines.find_map(|line| line.strip_prefix("VmLck:")?.trim().strip_suffix(" kB"));
    kib?.parse().ok()
}

/// How many tasks of a process wait in the kernel and can't be interrupted.
pub fn count_blocked(pid: u32) -> usize {
    tasks(pid).iter().filter(|task| is_blocked(task)).count()
}

/// What the tasks of a process wait for in the kernel. Those that can't be interrupted are the ones
/// that hang, if there are any.
pub fn stacks(pid: u32) -> String {
    let tasks = tasks(pid);
    let any_blocked = tasks.iter().any(is_blocked);
    let mut text = String::new();
    for task in tasks.iter().filter(|task| is_blocked(task) || !any_blocked) {
        let _ = writeln!(text, "task {}: {}", task.tid, state(task));
        let path = format!("/proc/{}/task/{}/stack", task.pid, task.tid);
        for line in std::fs::read_to_string(path).unwrap_or_default().lines() {
            let _ = writeln!(text, "    {}", line.trim_start_matches("[<0>] "));
        }
    }
    text.trim_end().to_owned()
}

fn tasks(pid: u32) -> Vec<Task> {
    let tasks = Process::new(pid as i32).and_then(|process| process.tasks());
    tasks.into_iter().flatten().flatten().collect()
}

fn state(task: &Task) -> String {
    task.status().map_or_else(|_| "gone".into(), |status| status.state)
}

fn is_blocked(task: &Task) -> bool {
    state(task).starts_with('D')
}
