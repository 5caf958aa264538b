# The rotation service itself: sees the GPUs through NVML, keeps its ledger on the host, and is never there twice.

variable "job_id" { type = string }
variable "namespace" { type = string }
variable "node_pool" { type = string }
variable "node" { type = string }
variable "image" { type = string } # repository@sha256:…
variable "gpu_uuids" { type = list(string) }
variable "port" { type = number }
variable "config_dir" { type = string } # holds fleet.yaml and what it names; read-only
variable "state_dir" { type = string }  # ledger, incidents; must exist
variable "nomad_address" { type = string }
variable "host_pids" { type = bool } # NVML tells bytes by process only where the host's processes are seen
variable "env" { type = map(string) }
variable "mounts" { type = map(string) } # further directories, read-only: host path -> path inside (models, CA files)
variable "cpu" { type = number }
variable "memory_mb" { type = number }

job "rotator" {
  id          = var.job_id
  name        = var.job_id
  namespace   = var.namespace
  type        = "service"
  node_pool   = var.node_pool
  datacenters = ["*"]
  priority    = 80

  meta = {
    role = "rotator"
  }

  constraint {
    attribute = "${node.unique.name}"
    value     = var.node
  }

  update {
    max_parallel      = 1
    canary            = 0 # never two services over the same engines
    health_check      = "checks"
    min_healthy_time  = "10s"
    healthy_deadline  = "3m"
    progress_deadline = "10m"
    auto_revert       = true
  }

  group "rotator" {
    count = 1

    # Engines go on serving while it is away, and are found again.
    restart {
      attempts = 5
      interval = "5m"
      delay    = "5s"
      mode     = "delay"
    }

    disconnect {
      lost_after = "1h"
      replace    = false
      reconcile  = "keep_original"
    }

    ephemeral_disk {
      size = 500
    }

    network {
      mode = "host"
      port "api" {
        static = var.port
      }
    }

    service {
      name     = var.job_id
      provider = "nomad"
      port     = "api"

      check {
        name     = "live"
        type     = "http"
        path     = "/healthz"
        interval = "10s"
        timeout  = "3s"

        check_restart {
          limit = 6
          grace = "60s"
        }
      }
    }

    task "rotator" {
      driver       = "docker"
      kill_signal  = "SIGTERM"
      kill_timeout = "30s"

      # NOMAD_TOKEN of this job's own identity: bind an ACL policy to it. The default identity takes no ttl.
      identity {
        env = true
      }

      config {
        image           = var.image
        runtime         = "nvidia" # NVML; no kernels run here
        init            = true
        network_mode    = "host"
        pid_mode        = var.host_pids ? "host" : ""
        readonly_rootfs = true
        cap_drop        = ["all"]
        security_opt    = ["no-new-privileges"]
        args            = ["serve", "-c", "/etc/rotator/fleet.yaml"]

        mounts = concat(
          [
            { type = "bind", source = var.config_dir, target = "/etc/rotator", readonly = true },
            { type = "bind", source = var.state_dir, target = "/var/lib/rotator" },
            { type = "tmpfs", target = "/tmp", tmpfs_options = { size = 67108864 } },
          ],
          [for from, to in var.mounts : { type = "bind", source = from, target = to, readonly = true }],
        )
      }

      env = merge(var.env, {
        NVIDIA_VISIBLE_DEVICES     = join(",", var.gpu_uuids)
        NVIDIA_DRIVER_CAPABILITIES = "utility"
        NOMAD_ADDR                 = var.nomad_address
        NOMAD_NAMESPACE            = var.namespace
      })

      logs {
        max_files     = 5
        max_file_size = 20
      }

      resources {
        cpu    = var.cpu
        memory = var.memory_mb
      }
    }
  }
}
