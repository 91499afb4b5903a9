// SPDX-License-Identifier: GPL-2.0-only

use super::{Container, lock, map_call, raw_map};
use crate::{Device, Error, MapArgs, Result, sys};
use rustix::{
    io::Errno,
    pipe::{PipeFlags, pipe_with},
    process::{Pid, Signal, WaitOptions, kill_process, waitpid},
};
use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    os::fd::{AsFd, AsRawFd},
};

/// A child of this process that shares its files, and has mapped its own copy of memory into a
/// container: of what is anonymous. It dies when this is dropped.
#[derive(Debug)]
pub struct Mapper {
    pid: Pid,
    dead: bool,
    commands: File,
    answers: BufReader<File>,
}

impl Mapper {
    /// Forks a child that makes `VFIO_IOMMU_MAP_DMA`, and then waits.
    ///
    /// `devices` are those that it keeps, beside the container and its groups, if it is told to
    /// [`Self::become_shell`].
    pub fn new(container: &Container, devices: &[&Device], args: &MapArgs<'_>) -> Result<Self> {
        let mut map = raw_map(args);
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|e| Error::new("pipe", e));
        let (from_parent, commands) = pipe()?;
        let (answers, to_parent) = pipe()?;
        let mut kept = vec![container.file.as_raw_fd()];
        kept.extend(lock(&container.groups).iter().map(|group| group.as_fd().as_raw_fd()));
        kept.extend(devices.iter().map(|device| device.as_fd().as_raw_fd()));
        // Entered before the kernel has it: should it take the memory for that of this process, which
        // is at the same address, it must still be there.
        lock(&container.mapped).add(args.iova, args.size, args.memory.clone());

        let (commands_fd, to_parent_fd) = (from_parent.as_raw_fd(), to_parent.as_raw_fd());
        let child = || {
            // SAFETY: As in `Container::map`, for the child's copy of the memory: nothing in the child
            // uses it, and it stays as long as the child does.
            let mapped = unsafe { sys::ioctl(&container.file, sys::IOMMU_MAP_DMA, &mut map) };
            let errno = mapped.map_or_else(Errno::raw_os_error, |_| 0);
            let told = rustix::io::write(&to_parent, &errno.to_ne_bytes());
            // What comes is what tells it to be a shell; the end means to end.
            if told.is_ok() && rustix::io::read(&from_parent, &mut [0; 1]) == Ok(1) {
                // SAFETY: This is a child that does nothing else.
                unsafe { sys::become_shell(commands_fd, to_parent_fd, &mut kept) };
            }
        };
        // SAFETY: It only makes system calls; the vector was made before.
        let pid = unsafe { sys::fork(child) }.map_err(|e| Error::new("fork", e))?;
        drop((from_parent, to_parent));
        let answers = BufReader::new(File::from(answers));
        let mut this = Self { pid, dead: false, commands: File::from(commands), answers };
        let mut errno = [0; 4];
        this.answers.read_exact(&mut errno).map_err(|e| failed("ask a child what it mapped", e))?;
        match i32::from_ne_bytes(errno) {
            0 => Ok(this),
            errno => Err(Error::new(map_call(args), Errno::from_raw_os_error(errno))),
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get() as u32
    }

    /// It executes `/bin/sh`, and keeps the container as file descriptor 3, then the groups, then the
    /// devices: its memory is another from now on.
    pub fn become_shell(&mut self) -> Result<()> {
        self.send(b"x")?;
        // It answers when it is there.
        self.run("true")
    }

    /// The shell runs a command.
    pub fn run(&mut self, command: &str) -> Result<()> {
        self.send(format!("{command}; echo done\n").as_bytes())?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer).map_err(|e| failed(command, e))?;
        match answer.as_str() {
            "done\n" => Ok(()),
            answer => Err(Error::other(format!("a shell that ran {command:?} says {answer:?}"))),
        }
    }

    /// It dies, if it hasn't yet.
    pub fn kill(&mut self) {
        if !std::mem::replace(&mut self.dead, true) {
            let killed = kill_process(self.pid, Signal::KILL);
            let ended = killed.and_then(|()| waitpid(Some(self.pid), WaitOptions::empty()));
            debug_assert!(ended.is_ok());
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.commands.write_all(bytes).map_err(|e| failed("tell a child what to do", e))
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        self.kill();
    }
}

fn failed(what: &str, error: std::io::Error) -> Error {
    Error::new(what, Errno::from_io_error(&error).unwrap_or(Errno::IO))
}
