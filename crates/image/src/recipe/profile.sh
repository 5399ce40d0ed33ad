# System-wide start-up file of login shells. It runs no program: sandboxes start
# `bash -l -c …` for every command.

PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
export PATH

if [ "${PS1-}" ] && [ "${BASH-}" ] && [ -f /etc/bash.bashrc ]; then
  . /etc/bash.bashrc
fi

for file in /etc/profile.d/*.sh; do
  if [ -r "$file" ]; then
    . "$file"
  fi
done
unset file
