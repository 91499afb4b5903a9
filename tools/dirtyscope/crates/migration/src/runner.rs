// SPDX-License-Identifier: GPL-2.0-only

//! Runs cases, and records what comes of them.

use crate::{contents::WrongMemory, guest::WrongInGuest, vmm::Role};
use anyhow::Result;
use events::{EXIT_SKIP, Event, Sink, Verdict};
use harness::{Context, Devices, Messages, Output, Recorder, Skip, stop_on_signals};
use mdev_dma::sysfs::MdevType;
use std::{
    borrow::Cow,
    cell::RefCell,
    fmt,
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};
use uuid::Uuid;

/// A case, which `run` runs.
#[derive(Clone)]
pub struct Case<F> {
    /// `family/name`, which stays as it is once people know it.
    pub name: Cow<'static, str>,
    /// What it is about, in a line.
    pub about: &'static str,
    /// Runs it.
    pub run: F,
}

/// A case, in a line.
pub const fn case<F>(name: &'static str, about: &'static str, run: F) -> Case<F> {
    Case { name: Cow::Borrowed(name), about, run }
}

/// A defect of QEMU's that is known, and showed as it does: an error of a case.
#[derive(Debug)]
pub struct KnownOfQemu {
    /// Its id in `Documentation/migrate.rst`.
    pub defect: &'static str,
    /// What it showed.
    pub shown: WrongMemory,
}

impl fmt::Display for KnownOfQemu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.shown.fmt(f)
    }
}

impl std::error::Error for KnownOfQemu {}

/// What a run is about.
pub struct Settings {
    /// What results call it.
    pub command: &'static str,
    /// Cases that are to be run.
    pub planned: usize,
    /// A device to use.
    pub device: Option<Uuid>,
    /// The kernel loses pages: what passes is a case that finds wrong pages and names them.
    pub control: bool,
}

impl Settings {
    /// Has `run` run cases, if this machine can, and says what came of them.
    pub fn run(
        &self,
        output: &Output,
        print: Sink,
        run: impl FnOnce(&mut Runner<'_>) -> Result<()>,
    ) -> Result<ExitCode> {
        if let Err(error) = MdevType::find() {
            output.begin(self.command, 0, Some(error.to_string()), print)?.end(false)?;
            return Ok(EXIT_SKIP.into());
        }
        let devices = Mutex::new(Devices::new(self.device)?);
        let stop = stop_on_signals()?;
        let recorder = RefCell::new(output.begin(self.command, self.planned, None, print)?);
        let mut runner = Runner {
            control: self.control,
            devices: &devices,
            recorder: &recorder,
            stop: &stop,
            messages: Messages::from_now()?,
            ran: 0,
            failed: 0,
        };
        run(&mut runner)?;
        let Runner { ran, failed, .. } = runner;
        let stopped = stop.load(Relaxed);
        recorder.into_inner().end(stopped)?;
        Ok(match failed {
            0 if stopped => ExitCode::FAILURE,
            0 if ran == 0 => EXIT_SKIP.into(),
            0 => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        })
    }
}

/// Runs cases, and records what comes of them.
pub struct Runner<'a> {
    control: bool,
    pub devices: &'a Mutex<Devices>,
    pub recorder: &'a RefCell<Recorder>,
    stop: &'a AtomicBool,
    messages: Messages,
    /// Cases that were not skipped: one that shows a known defect, and nothing else, is as good as any.
    ran: usize,
    failed: usize,
}

impl Runner<'_> {
    /// Whether no more cases are to be run.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Relaxed)
    }

    /// Runs a case, which returns what came of it, and what the VMM has said. Returns whether all was well
    /// in it.
    pub fn one(
        &mut self,
        name: &str,
        about: &str,
        run: impl FnOnce(&Context<'_>, &RefCell<Recorder>) -> Result<(Result<()>, String)>,
    ) -> Result<bool> {
        if self.is_stopped() {
            return Ok(false);
        }
        self.recorder.borrow_mut().begin(name, about)?;
        let log = self.recorder.borrow().log().clone();
        let (result, logs) = run(&Context::new(self.devices, &log, None), self.recorder)?;
        if self.is_stopped() {
            return Ok(false);
        }
        let verdict = self.judge(&result, &logs)?;
        self.failed += usize::from(matches!(verdict, Verdict::Fail { .. }));
        self.ran += usize::from(!matches!(verdict, Verdict::Skip { .. }));
        self.recorder.borrow_mut().result(name, verdict)?;
        Ok(result.is_ok())
    }

    /// What a case's result means. `logs` is what the VMM has said.
    fn judge(&mut self, result: &Result<()>, logs: &str) -> Result<Verdict> {
        let complaints = self.recorder.borrow_mut().complaints(&mut self.messages)?;
        let verdict = match result {
            Ok(()) if self.control => {
                Verdict::Fail { why: "the kernel loses pages, and none was found".into() }
            }
            Ok(()) => Verdict::Pass,
            Err(error) => self.judge_error(error, logs)?,
        };
        Ok(match complaints.is_empty() {
            true => verdict,
            false => verdict.with_complaints(&complaints),
        })
    }

    fn judge_error(&mut self, error: &anyhow::Error, logs: &str) -> Result<Verdict> {
        if let Some(Skip(why)) = error.downcast_ref() {
            return Ok(Verdict::Skip { why: why.clone() });
        }
        if let Some(KnownOfQemu { defect, shown }) = error.downcast_ref() {
            self.recorder.borrow_mut().record(&Event::Difference(shown.difference()))?;
            let why = format!("{shown}\n{logs}");
            return Ok(Verdict::Known { defect: (*defect).into(), why });
        }
        let mut found = None;
        if let Some(wrong) = error.downcast_ref::<WrongMemory>() {
            self.recorder.borrow_mut().record(&Event::Difference(wrong.difference()))?;
            // In the machine that was left, the device wrote to memory itself: nothing was lost there.
            found = (wrong.role == Role::Destination).then(|| wrong.to_string());
        }
        if let Some(wrong) = error.downcast_ref::<WrongInGuest>() {
            found = wrong.migrated.then(|| wrong.to_string());
        }
        if let (true, Some(text)) = (self.control, found) {
            self.recorder.borrow_mut().record(&Event::Progress { text })?;
            return Ok(Verdict::Pass);
        }
        Ok(Verdict::Fail { why: format!("{error:#}\n{logs}") })
    }
}
