{{/* The objects' name: the operator adds 16 characters, of 63. */}}
{{- define "kvmesh.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 47 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 47 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 47 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that select pods: none that an upgrade changes. */}}
{{- define "kvmesh.selector" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
kvmesh.io/name: {{ include "kvmesh.fullname" . }}
{{- end -}}

{{- define "kvmesh.labels" -}}
{{ include "kvmesh.selector" . }}
app.kubernetes.io/name: kvmesh
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* What the code fixes: files/generated.yaml, written by helm/generate.py. */}}
{{- define "kvmesh.generated" -}}
{{- .Files.Get "files/generated.yaml" -}}
{{- end -}}

{{- define "kvmesh.port" -}}
{{- $ingress := .Values.config.ingress | default dict -}}
{{- $ingress.port | default (include "kvmesh.generated" . | fromYaml).grpcPort | int64 -}}
{{- end -}}

{{- define "kvmesh.httpPort" -}}
{{- $ingress := .Values.config.ingress | default dict -}}
{{- $ingress.http_port | default (include "kvmesh.generated" . | fromYaml).httpPort | int64 -}}
{{- end -}}

{{/* What a proxy must let through: a request that is a little too large is refused by kvmesh. */}}
{{- define "kvmesh.messageBytes" -}}
{{- $ingress := .Values.config.ingress | default dict -}}
{{- $generated := include "kvmesh.generated" . | fromYaml -}}
{{- add ($ingress.max_request_bytes | default $generated.maxRequestBytes | int64) (int64 $generated.marginBytes) -}}
{{- end -}}

{{- define "kvmesh.drainSeconds" -}}
{{- $timeouts := .Values.config.timeouts | default dict -}}
{{- $timeouts.drain_s | default (include "kvmesh.generated" . | fromYaml).drainSeconds | ceil | int64 -}}
{{- end -}}

{{/* Worker groups by name, complete, as YAML. Null removes one. */}}
{{- define "kvmesh.workerGroups" -}}
{{- $groups := dict -}}
{{- range $name, $group := .Values.workerGroups -}}
{{- if not (kindIs "invalid" $group) -}}
{{- $_ := set $groups $name (mergeOverwrite (deepCopy $.Values.workerDefaults) (deepCopy $group)) -}}
{{- end -}}
{{- end -}}
{{- toYaml $groups -}}
{{- end -}}

{{/* Whether any worker has GPUs: true or nothing. */}}
{{- define "kvmesh.hasGpus" -}}
{{- range (include "kvmesh.workerGroups" . | fromYaml) -}}
{{- if gt (int .gpu.count) 0 -}}true{{- end -}}
{{- end -}}
{{- end -}}

{{- define "kvmesh.image" -}}
{{- $suffix := ternary "-cuda" "" (not (empty (include "kvmesh.hasGpus" .))) -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default (printf "%s%s" .Chart.AppVersion $suffix)) -}}
{{- end -}}
{{- end -}}

{{- define "kvmesh.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "kvmesh.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* Whether calls need a key: true or nothing. */}}
{{- define "kvmesh.needsKeys" -}}
{{- $auth := .Values.config.auth | default dict -}}
{{- if ne ($auth.mode | default "api_key") "none" -}}true{{- end -}}
{{- end -}}

{{- define "kvmesh.keySecret" -}}
{{- .Values.auth.existingSecret | default (printf "%s-keys" (include "kvmesh.fullname" .)) -}}
{{- end -}}

{{/*
Entries of the Secret of keys, as YAML; takes {keys, kept}, where kept is what the Secret has. A
tenant keeps its key when `admin` changes, and with it the entry's name.
*/}}
{{- define "kvmesh.keyEntries" -}}
{{- $entries := dict -}}
{{- range $tenant, $key := .keys -}}
{{- if not (kindIs "invalid" $key) -}}
{{- $admin := printf "%s.admin" $tenant -}}
{{- $value := get $.kept $tenant | default (get $.kept $admin) | default (randAlphaNum 48 | b64enc) -}}
{{- if $key.value -}}{{- $value = $key.value | b64enc -}}{{- end -}}
{{- $_ := set $entries (ternary $admin $tenant ($key.admin | default false)) $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $entries -}}
{{- end -}}

{{- define "kvmesh.hubSecret" -}}
{{- if .Values.model.hub.existingSecret -}}
{{- .Values.model.hub.existingSecret -}}
{{- else if .Values.model.hub.token -}}
{{- printf "%s-hub" (include "kvmesh.fullname" .) -}}
{{- end -}}
{{- end -}}

{{- define "kvmesh.modelClaim" -}}
{{- .Values.model.volume.existingClaim | default (printf "%s-models" (include "kvmesh.fullname" .)) -}}
{{- end -}}
