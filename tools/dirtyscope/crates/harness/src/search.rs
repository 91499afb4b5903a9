// SPDX-License-Identifier: GPL-2.0-only

//! Searches: jobs that go on until something fails, each in a worker, and what they find.

use crate::{
    Messages, Output, Recorder, stop_on_signals,
    worker::{Reported, Worker},
};
use anyhow::{Context as _, Result};
use events::{EXIT_SKIP, Event, Sink, Verdict, last_sequence};
use mdev_dma::sysfs::MdevType;
use serde::{Deserialize, Serialize};
use std::{
    fs,
    path::Path,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// After so long without a word, a sequence hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// What gives one result.
pub trait Job: Serialize {
    /// The name of its result.
    fn name(&self) -> String;

    /// What it is about, in a line.
    fn about(&self) -> String;

    /// The file for a sequence that fails; none if there is one.
    fn file(&self) -> Option<String>;
}

/// What a worker says.
#[derive(Serialize, Deserialize)]
pub enum Message {
    /// The log says how far it got.
    Progress,
    /// So much was done, of which so much counts: once for each job, before its result.
    Counted { all: u64, counting: u64 },
    /// All of it passed.
    Passed,
    /// A program failed; the log has what was done.
    Failed {
        /// How.
        what: String,
        /// Its text.
        program: String,
    },
    /// It can't be done here.
    Skipped(String),
}

/// What does jobs, each in a worker of its own.
pub struct Engine<'a> {
    /// What it is called.
    pub name: &'static str,
    /// Where events go.
    pub output: &'a Output,
    /// The directory to save sequences in that fail.
    pub save: &'a Path,
    /// What [`Message::Counted`] counts, and what of it.
    pub counts: (&'static str, &'static str),
}

impl Engine<'_> {
    /// Does jobs, one after the other.
    pub fn run<J: Job>(&self, jobs: &[J], print: Sink) -> Result<ExitCode> {
        let &Self { name, output, counts: of, .. } = self;
        if let Err(error) = MdevType::find() {
            output.begin(name, 0, Some(error.to_string()), print)?.end(false)?;
            return Ok(EXIT_SKIP.into());
        }
        let stop = stop_on_signals()?;
        let mut recorder = output.begin(name, jobs.len(), None, print)?;
        let mut messages = Messages::from_now()?;
        let mut all_passed = true;
        let (mut total, begin) = ((0, 0), Instant::now());
        for job in jobs {
            recorder.begin(&job.name(), &job.about())?;
            let watched = self.watch(job, &mut recorder, &stop, &mut total)?;
            let Some((mut verdict, hung)) = watched else {
                recorder.end(true)?;
                return Ok(ExitCode::FAILURE);
            };
            let complaints = recorder.complaints(&mut messages)?;
            if !complaints.is_empty() {
                verdict = verdict.with_complaints(&complaints);
            }
            all_passed &= !matches!(verdict, Verdict::Fail { .. });
            recorder.result(&job.name(), verdict)?;
            if hung {
                // What hangs has the devices: nothing more can be tried.
                all_passed = false;
                break;
            }
        }
        if let (all @ 1.., counting) = total {
            let (seconds, percent) = (begin.elapsed().as_secs(), 100 * counting / all);
            let text = format!("{name}: {all} {} in {seconds} s, {percent} % {}", of.0, of.1);
            recorder.record(&Event::Progress { text })?;
        }
        recorder.end(false)?;
        Ok(if all_passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// Has a worker do a job. Says what came of it, and whether it hangs; nothing if it was stopped.
    fn watch<J: Job>(
        &self,
        job: &J,
        recorder: &mut Recorder,
        stop: &AtomicBool,
        total: &mut (u64, u64),
    ) -> Result<Option<(Verdict, bool)>> {
        let mut worker = Worker::start(job, &recorder.log_path())?;
        loop {
            let reported = worker.next(LIMIT)?;
            recorder.follow()?;
            let (what, hung) = match reported {
                Reported::Message(Message::Progress) => continue,
                Reported::Message(Message::Counted { all, counting }) => {
                    total.0 += all;
                    total.1 += counting;
                    continue;
                }
                Reported::Message(Message::Passed) => return finished(worker, Verdict::Pass),
                Reported::Message(Message::Skipped(why)) => {
                    return finished(worker, Verdict::Skip { why });
                }
                Reported::Message(Message::Failed { what, program }) => {
                    let verdict = self.failed(job, what, &program, recorder)?;
                    return finished(worker, verdict);
                }
                Reported::Hung(stacks) => {
                    (format!("hung for {} s\n{stacks}", LIMIT.as_secs()), true)
                }
                Reported::Ended(_) if stop.load(Relaxed) => return Ok(None),
                Reported::Ended(status) => {
                    (format!("the process that did it ended, {status}"), false)
                }
            };
            let program = last_sequence(&recorder.rest()?);
            return Ok(Some((self.failed(job, what, &program, recorder)?, hung)));
        }
    }

    /// Saves a sequence that failed.
    fn failed<J: Job>(
        &self,
        job: &J,
        what: String,
        program: &str,
        recorder: &mut Recorder,
    ) -> Result<Verdict> {
        if let Some(file) = job.file() {
            let text = format!("# {}\n{program}", what.lines().next().unwrap_or_default());
            let path = self.save.join(&file);
            fs::write(&path, &text).with_context(|| format!("save {}", path.display()))?;
            recorder.record(&Event::Saved { file, text })?;
        }
        Ok(Verdict::Fail { why: what })
    }
}

/// Waits for the end of a worker that has said what came of its job: until then it has devices, which it
/// gives back as they were, also to the next one.
fn finished(worker: Worker, verdict: Verdict) -> Result<Option<(Verdict, bool)>> {
    Ok(Some(match (worker.finish(LIMIT)?, verdict) {
        (None, verdict) => (verdict, false),
        (Some(_), failed @ Verdict::Fail { .. }) => (failed, true),
        (Some(why), _) => (Verdict::Fail { why }, true),
    }))
}
